"""OFT, BOFT, HRA, RoAd.

peft turns the other way in BOFT, and in OFT without its series: S here is −S there.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from inlay_peft_bridge.converter import Config, Converter, Place, Tensors
from inlay_peft_bridge.report import refused

NEW = re.compile(r"0\.(1[89]|[2-9]\d|\d{3,})\b|[1-9]")


def read_oft(config: Config) -> dict[str, Any]:
    """Return `cayley`, `terms`, `shared` and the constraint; peft's short series are other ones."""
    size, terms = config.get("oft_block_size", 32), config.get("num_cayley_neumann_terms", 5)
    neumann = config.get("use_cayley_neumann", False)  # checkpoints of before it had the series do not say
    if neumann and terms < 4:
        raise refused(
            "peft's series of so few terms is not Cayley's",
            saw=f"num_cayley_neumann_terms={terms}",
            do="merge it in peft, or train with at least 4 terms",
        )
    version = str(config.get("peft_version") or "0")
    if neumann and not NEW.match(version):
        raise refused(
            "before its version 0.18 peft computed this series in another way",
            saw=f"peft_version={version!a}",
            do="merge it with the version of peft that trained it",
        )
    return {
        "block_size": size,
        "cayley": "series" if neumann else "exact",
        **({"terms": terms} if neumann else {}),
        "shared": config.get("block_share", False),
        "epsilon": config.get("eps", 6e-5) if config.get("coft") else None,
    }


def write_oft(settings: Config) -> dict[str, Any]:
    if settings["cayley"] == "series" and settings["terms"] < 4:
        raise refused(
            "peft's series of so few terms is not Cayley's",
            saw=f"terms={settings['terms']}",
            do="train with at least 4 terms, or merge it: inlay merge",
        )
    epsilon = settings["epsilon"]
    return {
        "r": 0,
        "oft_block_size": settings["block_size"],
        "use_cayley_neumann": settings["cayley"] == "series",
        "num_cayley_neumann_terms": settings["terms"],
        "block_share": settings["shared"],
        "coft": epsilon is not None,
        **({} if epsilon is None else {"eps": epsilon}),
    }


def turned_oft(tensors: Tensors, place: Place) -> Tensors:
    """Return S as the other side has it."""
    if place.site.kind == "conv":
        raise refused(
            "peft's OFT of a convolution sums overlapping patches, which is no rotation",
            saw=place.path,
            do="leave the convolution out, or merge the adapter: inlay merge",
        )
    exact = place.settings["cayley"] == "exact"
    return {"rotation.skew": -tensors["rotation.skew"]} if exact else tensors


OFT = Converter(
    "OFT",
    "oft",
    {"oft_R.weight": "rotation.skew", "oft_embedding_R.weight": "rotation.skew"},
    settings={"module_dropout": "dropout"},
    read_config=read_oft,
    write_config=write_oft,
    reads=frozenset(
        {
            "r",
            "oft_block_size",
            "use_cayley_neumann",
            "num_cayley_neumann_terms",
            "block_share",
            "coft",
            "eps",
        }
    ),
    starts=frozenset({"init_weights"}),
    read=turned_oft,
    write=turned_oft,
)


def read_boft(tensors: Tensors, place: Place) -> Tensors:
    """Return the triangles of −(M − Mᵀ)/2, and σ − 1."""
    m = tensors["#1.rotation.skew"]
    rows, columns = torch.triu_indices(m.shape[-1], m.shape[-1], 1)
    return {"#1.rotation.skew": ((m.mT - m) / 2)[..., rows, columns], "scale": tensors["scale"].flatten() - 1}


def write_boft(tensors: Tensors, place: Place) -> Tensors:
    """Return M = −S, and σ."""
    upper = tensors["#1.rotation.skew"]
    size = place.settings["block_size"]
    rows, columns = torch.triu_indices(size, size, 1)
    m = upper.new_zeros(*upper.shape[:-1], size, size)
    m[..., rows, columns] = -upper
    sigma = 1 + tensors["scale"]
    shape = (1, -1) if place.site.kind == "conv" else (-1, 1)
    return {"#1.rotation.skew": m - m.mT, "scale": sigma.view(shape)}


BOFT = Converter(
    "BOFT",
    "boft",
    {"boft_R": "#1.rotation.skew", "boft_s": "scale"},
    settings={
        "boft_n_butterfly_factor": "factors",
        "boft_dropout": "dropout",
        "boft_block_size": "block_size",
    },
    starts=frozenset({"init_weights"}),
    read=read_boft,
    write=write_boft,
)


def read_hra(config: Config) -> dict[str, Any]:
    return {"form": "gram_schmidt" if config.get("apply_GS") else "chain"}


HRA = Converter(
    "HRA",
    "hra",
    {"hra_u": "rotation.u"},
    settings={"r": "rank"},
    read_config=read_hra,
    write_config=lambda settings: {"apply_GS": settings["form"] == "gram_schmidt"},
    reads=frozenset({"apply_GS"}),
    starts=frozenset({"init_weights"}),
)

ROAD = Converter(
    "ROAD",
    "road",
    {"road_theta": "angle", "road_alpha": "scale"},
    settings={"variant": "variant", "group_size": "group_size"},
    starts=frozenset({"init_weights"}),
    read=lambda tensors, place: {**tensors, "scale": tensors["scale"] - 1},
    write=lambda tensors, place: {**tensors, "scale": tensors["scale"] + 1},
)
