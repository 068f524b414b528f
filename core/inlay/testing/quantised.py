"""Tiny models with real quantised layers, as transformers loads them, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from inlay.backends import backend_of
from inlay.testing.tools import lively
from inlay.weights import parts_of

PACKED_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}  # a 4-bit block has 64 entries


@dataclass(frozen=True)
class Kind:
    """A way to quantise, and how far it is from exact, as ‖difference‖ / ‖…‖.

    `rounding`: what the layer gives, against the weight that is read (the layer may round its input,
    or compute in bfloat16). `noise`: a weight with independent normal entries, against itself stored so.
    """

    package: str
    rounding: float
    noise: float


# 4 bits of bitsandbytes: where a processor has the kernel, it computes in bfloat16 (2⁻⁸).
KINDS = {
    "nf4": Kind("bitsandbytes", 6e-3, 0.12),
    "fp4": Kind("bitsandbytes", 6e-3, 0.16),
    "nested nf4": Kind("bitsandbytes", 6e-3, 0.12),
    "int8": Kind("bitsandbytes", 1.2e-2, 0.012),
    "torchao int8": Kind("torchao", 1e-6, 0.012),
    "torchao int8 in groups": Kind("torchao", 1e-6, 0.012),
    "torchao int4": Kind("torchao", 1e-6, 0.15),
    "torchao int4 shifted": Kind("torchao", 1e-6, 0.13),
}


def kinds() -> tuple[str, ...]:
    """Return the kinds whose package is installed here."""
    return tuple(name for name, kind in KINDS.items() if find_spec(kind.package) is not None)


def packed(family: str, kind: str = "nf4", *, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a lively model with every linear layer but the head in few bits; `kind` is one of `KINDS`."""
    model = lively(family, seed=seed, **changes)
    for name, layer in list(model.named_modules()):
        linear = as_linear(layer)
        if linear is not None and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, few_bits(linear, kind))
    return model.eval()


def as_linear(layer: Any) -> nn.Linear | None:
    """Return a linear layer, or transformers' Conv1D as the linear layer that it is quantised as."""
    if type(layer) is nn.Linear:
        return layer
    if type(layer).__name__ != "Conv1D":
        return None
    made = nn.Linear(*layer.weight.shape)
    made.weight, made.bias = nn.Parameter(layer.weight.data.T.contiguous()), layer.bias
    return made


def few_bits(layer: nn.Linear, kind: str) -> nn.Module:
    """Return the layer as the kind's library keeps it."""
    made = _torchao(layer, kind) if kind.startswith("torchao") else _bitsandbytes(layer, kind)
    assert backend_of(made) is not None
    return made


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that quantised weights are made of, as bytes."""
    weights = {n: m._parameters["weight"] for n, m in model.named_modules() if backend_of(m) is not None}
    return {
        f"{name}.{i}": part.detach().contiguous().view(torch.uint8)
        for name, weight in weights.items()
        if weight is not None
        for i, part in enumerate(parts_of(weight))
    }


def _bitsandbytes(layer: nn.Linear, kind: str) -> nn.Module:
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
    return made.to("cpu")  # type: ignore[no-any-return]


def _torchao(layer: nn.Linear, kind: str) -> nn.Module:
    from torchao import quantization as ao

    config: Any
    if "int8" in kind:
        rows = ao.PerGroup(32) if kind.endswith("in groups") else ao.PerRow()
        config = ao.Int8WeightOnlyConfig(granularity=rows, set_inductor_config=False)
    else:
        mapping = ao.MappingType.ASYMMETRIC if kind.endswith("shifted") else ao.MappingType.SYMMETRIC
        config = ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32), mapping)  # type: ignore[attr-defined]
    model = nn.Sequential(layer)
    ao.quantize_(model, config)
    return model[0]
