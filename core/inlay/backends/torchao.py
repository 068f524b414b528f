"""torchao: linear layers whose weight is a quantised tensor; int8 and int4 can be written, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import (
    Int8Tensor,
    IntxUnpackedToInt8Tensor,
    MappingType,
    PerGroup,
    PerRow,
    PerTensor,
)
from torchao.utils import TorchAOBaseTensor

from inlay.backends import GROUP, Backend
from inlay.errors import CannotMerge


class Torchao(Backend):
    """`nn.Linear` after torchao's `quantize_`."""

    def handles(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return isinstance(module, nn.Linear) and isinstance(weight, TorchAOBaseTensor)

    def dequantize(self, module: Any) -> Tensor:
        weight = module.weight
        values: Tensor = weight.dequantize()
        scale = getattr(weight, "act_pre_scale", None)  # what the layer multiplies its input by
        return values if scale is None else values * scale

    def requantize(self, module: Any, weight: Tensor) -> dict[str, Any]:
        old = module.weight
        if getattr(old, "act_pre_scale", None) is not None or type(old) not in WRITERS:
            raise CannotMerge(
                "this weight can be read but not written in its own scheme",
                saw=f"a {type(old).__name__} of torchao",
                do=f'merge(..., quantised="dequantise"), or a backend that knows it ({GROUP})',
            )
        made = WRITERS[type(old)](old, weight.to(old.dtype))
        return {"weight": nn.Parameter(made, requires_grad=False)}

    def compute_dtype(self, module: Any) -> torch.dtype | None:
        found: torch.dtype = module.weight.dtype
        return found


def _int8(old: Any, weight: Tensor) -> Any:
    group = old.block_size[-1]
    if old.scale.numel() == 1:
        granularity: Any = PerTensor()
    else:
        granularity = PerRow() if group == weight.shape[-1] else PerGroup(group)
    return Int8Tensor.from_hp(
        weight, granularity, mapping_type=_mapping(old), act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale, act_quant_zero_point=old.act_quant_zero_point,
        reduce_range=old.reduce_range,
    )  # fmt: skip


def _intx(old: Any, weight: Tensor) -> Any:
    return IntxUnpackedToInt8Tensor.from_hp(
        weight, old.block_size, old.target_dtype, mapping_type=_mapping(old),
        activation_quantization=old.activation_quantization,
    )  # fmt: skip


def _mapping(old: Any) -> MappingType:
    shifted = old.zero_point is not None and bool(old.zero_point.any())
    return MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC


WRITERS = {Int8Tensor: _int8, IntxUnpackedToInt8Tensor: _intx}
