"""bitsandbytes: 4 bits (NF4, FP4, statistics quantised too) and 8 bits."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from inlay.backends import Backend
from inlay.hosts import own_class

bnb: Any = bitsandbytes


class Bitsandbytes(Backend):
    """`Linear4bit` and `Linear8bitLt`, before and after what their first forward rearranges."""

    def handles(self, module: nn.Module) -> bool:
        weight: Any = module._parameters.get("weight")
        if isinstance(module, bnb.nn.Linear4bit):
            return weight is not None and _state(module) is not None
        return isinstance(module, bnb.nn.Linear8bitLt) and weight is not None and weight.dtype == torch.int8

    def dequantize(self, module: Any) -> Tensor:
        if isinstance(module, bnb.nn.Linear4bit):
            return self._packed(module) if self.inference_only(module) else _unpacked(module)
        state, weight = module.state, module.weight
        scale = weight.SCB if weight.SCB is not None else state.SCB
        codes = weight.data if weight.SCB is not None or state.CB is None else state.CB
        values: Tensor = codes.float() * scale.float().view(-1, 1) / 127.0
        return values

    def requantize(self, module: Any, weight: Tensor) -> dict[str, Any]:
        return _four_bits(module, weight) if isinstance(module, bnb.nn.Linear4bit) else _eight(module, weight)

    def compute_dtype(self, module: Any) -> torch.dtype | None:
        found: torch.dtype | None = getattr(module, "compute_dtype", None)
        return found

    def inference_only(self, module: nn.Module) -> bool:
        """Return whether a forward rearranged a 4-bit weight for the CPU's inference kernel."""
        return bool(getattr(_state(module), "packing_format_for_cpu", False))

    def _packed(self, module: Any) -> Tensor:
        """Read a rearranged weight as only the layer itself can: what it makes of the unit vectors."""
        base = own_class(module)
        shadow: Any = object.__new__(base)
        shadow.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, "bias": None}}
        eye = torch.eye(module.in_features, dtype=module.compute_dtype or torch.float32)
        with torch.no_grad():
            out: Tensor = bnb.nn.Linear4bit.forward(shadow, eye)
        return out.T.float()


def _state(module: Any) -> Any:
    """Return the statistics of a 4-bit weight; sharding leaves them on the module alone."""
    found = getattr(module._parameters.get("weight"), "quant_state", None)
    return getattr(module, "quant_state", None) if found is None else found


def _unpacked(module: Any) -> Tensor:
    values: Tensor = bnb.functional.dequantize_4bit(module.weight.data, _state(module))
    return values.float()


def _four_bits(module: Any, weight: Tensor) -> dict[str, Any]:
    old, state = module.weight, _state(module)
    dtype = getattr(state, "original_dtype", state.dtype)
    how = {
        name: getattr(old, name)
        for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }
    made = bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, **how).to(weight.device)
    return {"weight": made, "quant_state": made.quant_state}


def _eight(module: Any, weight: Tensor) -> dict[str, Any]:
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    made = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    state = copy.copy(module.state)
    state.CB = state.SCB = None
    return {"weight": made, "state": state}
