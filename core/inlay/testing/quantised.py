"""Tiny models with real bitsandbytes layers, as transformers loads them, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from inlay.testing.tools import lively

PACKED_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}  # a 4-bit block has 64 entries


def packed(family: str, kind: str = "nf4", *, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a lively model with every linear layer but the head in few bits.

    `kind` is "nf4", "fp4", "nested nf4" (quantised statistics too), or "int8".
    """
    model = lively(family, seed=seed, **changes)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, few_bits(layer, kind))
    return model.eval()


def few_bits(layer: nn.Linear, kind: str) -> nn.Module:
    """Return the layer as bitsandbytes keeps it."""
    import bitsandbytes

    bnb: Any = bitsandbytes

    size, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
    made: Any
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(*size, bias=has_bias, has_fp16_weights=False, threshold=0.0)
        made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        how: dict[str, Any] = {
            "quant_type": kind.rpartition(" ")[2],
            "compress_statistics": kind.startswith("nested"),
        }
        made = bnb.nn.Linear4bit(*size, bias=has_bias, compute_dtype=torch.float32, **how)
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, **how)
    if has_bias:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    made = made.to("cpu")
    assert not made.weight.is_floating_point()
    return made  # type: ignore[no-any-return]
