"""Quantised layers in a merge: made plain in place, folded into as such, then what was asked for.

The module stays the same object, so that what is attached to it stays; its class and its own
attributes change. What it was is kept as a module of its class with the very tensors it had.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from inlay.backends import Backend
from inlay.hosts import CHILD, change_own_class, own_class
from inlay.weights import parts_of, wide

WAYS = ("dequantise", "requantise")
TENSORS = ("_parameters", "_buffers")
# What belongs to a module whatever its class: hooks, children, mode; what inlay and accelerate put there.
LASTING = {*nn.Module().__dict__, "_hf_hook", "_old_forward", "forward"} - {
    *TENSORS,
    "_non_persistent_buffers_set",
}


class Thawed:
    """A quantised layer that is a plain one for now; `original` is what it was."""

    def __init__(self, module: nn.Module, backend: Backend, dtype: torch.dtype) -> None:
        self.module, self.backend, self.dtype = module, backend, dtype
        self.original = copy_of(module)

    def thaw(self) -> None:
        """Make the layer a plain one with its weight in float32."""
        weight = wide(self.backend.dequantize(self.module))
        bias: Any = getattr(self.module, "bias", None)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain._parameters["weight"] = nn.Parameter(weight.clone(), requires_grad=False)
        if bias is not None:
            plain._parameters["bias"] = nn.Parameter(wide(bias).clone(), requires_grad=False)
        put(self.module, plain)

    def settle(self, how: str) -> None:
        """Leave a plain layer in the dtype around it ("dequantise"), or one as before ("requantise")."""
        weight, bias = self.module._parameters["weight"], self.module._parameters["bias"]
        assert weight is not None
        if how == "dequantise":
            for parameter in (weight, bias):
                if parameter is not None:
                    parameter.data = parameter.data.to(self.dtype)
            return
        old: Any = getattr(self.original, "bias", None)
        same = torch.equal(weight, wide(self.backend.dequantize(self.original)))
        attributes = {} if same else self.backend.requantize(self.original, weight.data)
        if bias is not None and (old is None or not torch.equal(wide(old), bias)):
            attributes["bias"] = bias.data.to(self.dtype if old is None else old.dtype)
        put(self.module, self.original)
        for name, value in attributes.items():
            set_own(self.module, name, value)


def copy_of(module: nn.Module) -> nn.Module:
    """Return a module of the same own class that holds the same tensors and attributes, deltas left out."""
    made: nn.Module = object.__new__(own_class(module))
    own = {k: v.copy() if k in (*TENSORS, "_modules") else v for k, v in module.__dict__.items()}
    made.__dict__ = {k: v for k, v in own.items() if not k.startswith("_inlay")}
    made._modules.pop(CHILD, None)
    return made


def put(module: nn.Module, source: nn.Module) -> None:
    """Make `module` what `source` is: class, tensors, attributes in their order; hooks and children stay."""
    here = module.__dict__
    taken = {k: v.copy() if k in TENSORS else v for k, v in source.__dict__.items() if k not in LASTING}
    kept = {k: v for k, v in here.items() if k in LASTING or k.startswith("_inlay")}
    order = [k for k in source.__dict__ if k in taken or k in kept]
    module.__dict__ = {**{k: {**kept, **taken}[k] for k in order}, **kept}
    change_own_class(module, own_class(source))


def set_own(module: nn.Module, name: str, value: Any) -> None:
    """Set a parameter, buffer or other attribute of a module where one of that name is kept."""
    for kept in (module._parameters, module._buffers):
        if name in kept:
            is_parameter = kept is module._parameters and not isinstance(value, nn.Parameter)
            kept[name] = nn.Parameter(value, requires_grad=False) if is_parameter else value
            return
    module.__dict__[name] = value


def leave_out(model: Any, names: Iterable[str]) -> None:
    """Tell transformers that these layers are plain now, so that a saved model is loaded as it is."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    known = getattr(getattr(model, "hf_quantizer", None), "modules_to_not_convert", None)
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(config, field):
            before = getattr(config, field) or known or []
            setattr(config, field, [*before, *(name for name in names if name not in before)])


def bytes_of(module: nn.Module) -> int:
    """Return how many bytes a layer's tensors take, those inside a quantised tensor each."""
    tensors = (t for t in {**module._parameters, **module._buffers}.values() if t is not None)
    return sum(part.numel() * part.element_size() for t in tensors for part in parts_of(t))
