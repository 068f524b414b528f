"""LoRA and DoRA: factors, ranks and scales by layer, several slices of a fused layer as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from inlay.sites import Slice
from inlay_peft_bridge.converter import Config, Converter, Place, Tensors
from inlay_peft_bridge.report import refused

SAME_BASE = (True, False, "gaussian", "eva", "orthogonal", None)


def read_config(config: Config) -> dict[str, Any]:
    """Return `scaling`; a start that changes the base's weights is refused: they are not in the file."""
    start = config.get("init_lora_weights", True)
    if start not in SAME_BASE:
        raise refused(
            "the adapter was trained on weights that its start had changed",
            saw=f"init_lora_weights={start!a}",
            do="convert it in peft first: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    return {
        "scaling": "rsqrt" if config.get("use_rslora") else "standard",
        "bias": "own" if config.get("lora_bias") else "none",
    }


def write_config(settings: Config) -> dict[str, Any]:
    if settings["bias"] == "layer":
        raise refused(
            "peft keeps trained biases of layers as values of the base's, not as differences",
            saw='bias="layer"',
            do='train with bias="own", or merge the adapter: inlay merge',
        )
    return {"use_rslora": settings["scaling"] == "rsqrt", "lora_bias": settings["bias"] == "own"}


def own_config(place: Place) -> dict[str, Any]:
    """Return the rank and alpha of a site by its tensors and its scale: a start may have moved them."""
    delta: Any = place.deltas[0]
    rank = len(factors(place)["down"])
    return {"r": rank, "lora_alpha": alpha(delta.scale, rank, place.settings["scaling"] == "rsqrt")}


def alpha(scale: float, rank: int, stabilised: bool) -> float:
    """Return alpha of s = alpha / rank, or alpha / √rank."""
    found = scale * (math.sqrt(rank) if stabilised else rank)
    return round(found) if abs(found - round(found)) < 1e-9 * found else found


def read(tensors: Tensors, place: Place) -> Tensors:
    """Return the factors of a layer; a convolution's must run as peft runs them."""
    if place.site.kind == "conv":
        check_convolution(place)
    return tensors


def factors(place: Place) -> Tensors:
    """Return A and B of a site's change; of double rank from a start that is kept beside them."""
    delta: Any = place.deltas[0]
    down, up = delta.pair(delta.down.dtype)
    return {"down": down.detach(), "up": up.detach()}


def write(tensors: Tensors, place: Place) -> Tensors:
    """Return the factors as peft shapes them."""
    tensors = {**tensors, **factors(place)}
    if place.site.kind == "conv":
        check_convolution(place)
        beside = tensors["down"].dim() - 2
        return {**tensors, "up": tensors["up"].reshape(*tensors["up"].shape, *(1,) * beside)}
    return tensors


def check_convolution(place: Place) -> None:
    """Raise where peft's convolution beside a layer is another than the layer's."""
    conv = place.site.module
    if conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
        raise refused(
            "peft runs the factors of this convolution in another way",
            saw=f"{place.path}: groups={conv.groups}, dilation={conv.dilation}, {conv.padding_mode} padding",
            do="merge the adapter instead: inlay merge",
        )


def join(parts: Sequence[tuple[Slice, Tensors, Config]], out: int) -> tuple[Tensors, dict[str, Any]]:
    """Return the factors of a fused layer: A's rows below each other, B in blocks, zero elsewhere."""
    stabilised = parts[0][2]["use_rslora"]
    scales = [c["lora_alpha"] / (math.sqrt(c["r"]) if stabilised else c["r"]) for _, _, c in parts]
    if max(scales) - min(scales) > 1e-9 * max(scales):
        raise refused(
            "slices of one fused layer have scales of their own, and peft has one for all of it",
            saw=", ".join(map(str, scales)),
            do="give them one alpha and rank",
        )
    down = torch.cat([tensors["down"] for _, tensors, _ in parts])
    columns = []
    for part, tensors, _ in parts:
        up = tensors["up"]
        columns.append(part.put(up.new_zeros(out, up.shape[1]), up, 0))
    config = {"r": len(down), "lora_alpha": alpha(scales[0], len(down), stabilised)}
    joined = {"down": down, "up": torch.cat(columns, 1)}
    if "bias" in parts[0][1]:
        joined["bias"] = parts[0][1]["bias"].new_zeros(out)
        for part, tensors, _ in parts:
            joined["bias"] = part.put(joined["bias"], tensors["bias"], 0)
    return joined, config


LORA = Converter(
    "LORA",
    "lora",
    {
        "lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "bias",
        "lora_embedding_A": "down", "lora_embedding_B": "up",
    },
    settings={"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"},
    read_config=read_config,
    write_config=write_config,
    reads=frozenset({"use_rslora", "init_lora_weights", "lora_bias"}),
    starts=frozenset({"eva_config", "qalora_group_size", "megatron_core"}),
    when={"use_dora": False},
    read=read,
    write=write,
    patterns={"rank_pattern": "r", "alpha_pattern": "lora_alpha"},
    own_config=own_config,
    join=join,
)  # fmt: skip


def read_dora(tensors: Tensors, place: Place) -> Tensors:
    """Return m − ‖W‖ for peft's m."""
    own = tensors["magnitude"]
    norms = place.weight.norm(dim=1)
    return {**tensors, "magnitude": own.reshape(norms.shape).to(norms.dtype) - norms}


def write_dora(tensors: Tensors, place: Place) -> Tensors:
    """Return m = ‖W‖ + what is kept of it."""
    norms = place.weight.norm(dim=1)
    magnitude = (norms + tensors["magnitude"].to(norms.dtype)).float()
    return {**tensors, **factors(place), "magnitude": magnitude}


DORA = replace(
    LORA,
    method="dora",
    tensors={"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude"},
    when={"use_dora": True},
    read=read_dora,
    write=write_dora,
    join=None,
    needs_weights=True,
)
