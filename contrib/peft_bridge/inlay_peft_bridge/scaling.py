"""(IA)³: l here as l − 1; peft tells by a list of modules which are scaled at their input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inlay.sites import Slice
from inlay_peft_bridge.converter import Config, Converter, Place, Tensors
from inlay_peft_bridge.report import refused


def read(tensors: Tensors, place: Place) -> Tensors:
    """Return l − 1 of peft's (out, 1), or (1, in) where the input is scaled."""
    vector = tensors["scale"]
    at_input = place.deltas[0].face == "input"
    if vector.dim() != 2 or vector.shape[0 if at_input else 1] != 1:
        raise refused(
            "peft scales the other side of this layer",
            saw=f"{place.path}: {tuple(vector.shape)}, here the {'input' if at_input else 'output'}'s",
            do="leave the layer out: (IA)^3 scales keys, values and what the feed-forward's last layer reads",
        )
    return {"scale": vector.flatten() - 1}


def write(tensors: Tensors, place: Place) -> Tensors:
    shape = (1, -1) if place.deltas[0].face == "input" else (-1, 1)
    return {"scale": (1 + tensors["scale"]).view(shape)}


def own_config(place: Place) -> dict[str, Any]:
    return {"feedforward_modules": place.deltas[0].face == "input"}


def join(parts: Sequence[tuple[Slice, Tensors, Config]], out: int) -> tuple[Tensors, dict[str, Any]]:
    """Return l of a fused layer, 1 where no slice is scaled."""
    whole = torch.ones(out, 1, dtype=parts[0][1]["scale"].dtype)
    for part, tensors, _ in parts:
        whole = part.put(whole, tensors["scale"], 0)
    return {"scale": whole}, {}


IA3 = Converter(
    "IA3",
    "ia3",
    {"ia3_l": "scale"},
    starts=frozenset({"init_ia3_weights"}),
    lists=frozenset({"feedforward_modules"}),
    read=read,
    write=write,
    own_config=own_config,
    join=join,
)
