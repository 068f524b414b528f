"""Bitsandbytes' layers on tensors without values: real layers, whose weights only have shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from inlay_train.quantised import FewBits


def layers(skeleton: nn.Module, how: str, dtype: str, heads: Sequence[str]) -> dict[str, nn.Module]:
    """Return the few-bit layers that `inlay train` would have, by name; they take the skeleton's places."""
    from transformers.integrations import replace_with_bnb_linear

    kind, _, nested = how.partition("-")
    wanted = FewBits(8 if how == "int8" else 4, bool(nested), dtype).configuration(heads)
    if how != "int8":
        wanted.bnb_4bit_quant_type = kind
    plain = dict(skeleton.named_modules())
    replace_with_bnb_linear(skeleton, list(heads), wanted)
    return {name: module for name, module in skeleton.named_modules() if module is not plain[name]}


def quantise(model: nn.Module, few: Mapping[str, nn.Module], how: str) -> None:
    """Put few-bit layers in the places of plain ones, whose weights the library itself quantises."""
    table_of_statistics()
    for name, module in few.items():
        _fill(module, model.get_submodule(name), how)
        model.set_submodule(name, module)


def _fill(module: Any, plain: Any, how: str) -> None:
    """Give a new few-bit layer the weight of the plain one it replaces."""
    turned = type(plain).__name__ == "Conv1D"
    weight = plain.weight.data.T.contiguous() if turned else plain.weight.data
    module.weight = _eight(weight) if how == "int8" else _four(weight, how)
    if plain.bias is not None:
        module.bias = nn.Parameter(plain.bias.data, requires_grad=False)


def _four(weight: Tensor, how: str) -> nn.Parameter:
    import bitsandbytes

    kind, _, nested = how.partition("-")
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type=kind, blocksize=64, compress_statistics=bool(nested)
    )
    return _parameter(codes, quant_state=state, quant_type=kind, bnb_quantized=True)


def _eight(weight: Tensor) -> nn.Parameter:
    import bitsandbytes

    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16))
    return _parameter(codes, CB=codes, SCB=scales, has_fp16_weights=False)


def _parameter(codes: Tensor, **attributes: Any) -> nn.Parameter:
    """Return a parameter with what the layers' forward looks for on it.

    Their own classes cannot hold tensors without values: each is a subclass of Tensor by itself.
    """
    made = nn.Parameter(codes, requires_grad=False)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def table_of_statistics() -> None:
    """Make the table that bitsandbytes keeps for the process, as its first nested quantisation does.

    Its values are computed one by one, which shapes alone do not allow.
    """
    from bitsandbytes import functional

    if "dynamic" not in functional.name2qmap:
        with unset_fake_temporarily():
            functional.name2qmap["dynamic"] = functional.create_dynamic_map()
