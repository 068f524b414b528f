"""Backends: how a library keeps the weights of its quantised layers, one small class each.

A package offers one as an entry point of the group `inlay.backends`, named after the package that
defines the layers; it is imported once that package is, so that plain models import nothing.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

GROUP = "inlay.backends"


class Backend:
    """What core must know of one way to quantise a layer. Methods know nothing of it."""

    readable = True  # whether the weight can be read at all

    def handles(self, module: nn.Module) -> bool:
        """Return whether the module keeps a quantised weight of this kind."""
        raise NotImplementedError

    def dequantize(self, module: nn.Module) -> Tensor:
        """Return the weight (out, in) as it acts, floating; the module is left as it is."""
        raise NotImplementedError

    def requantize(self, module: nn.Module, weight: Tensor) -> dict[str, Any]:
        """Return the attributes of the module, parameters among them, that hold `weight` in its own scheme.

        Nothing that the module holds now may be changed. Raise `CannotMerge` where there is no way.
        """
        raise NotImplementedError

    def compute_dtype(self, module: nn.Module) -> torch.dtype | None:
        """Return the dtype the layer computes in, or None where it is that of its input."""
        return None

    def inference_only(self, module: nn.Module) -> bool:
        """Return whether no gradient passes the layer as it is now."""
        return False


class Sealed(Backend):
    """A linear layer that packs its weight in a way no backend knows (GPTQ, AWQ, HQQ, …)."""

    readable = False

    def handles(self, module: nn.Module) -> bool:
        if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            return False
        own = {**module._parameters, **module._buffers}
        weight = own.get("weight")
        if weight is not None and weight.is_floating_point() and weight.dtype.itemsize > 1:
            return False
        return any(tensor is not None and _packs(tensor) for tensor in own.values())

    def compute_dtype(self, module: nn.Module) -> torch.dtype | None:
        found = getattr(module, "compute_dtype", None)
        return found if isinstance(found, torch.dtype) else None


def _packs(tensor: Tensor) -> bool:
    """Return whether a tensor can be a packed weight: a matrix of integers, or of floats of 8 bits."""
    return tensor.dim() > 1 and (not tensor.is_floating_point() or tensor.dtype.itemsize == 1)


SEALED = Sealed()


def backend_of(module: nn.Module) -> Backend | None:
    """Return what knows how the module's weight is quantised; None for a plain one."""
    for package in _packages():
        if package in sys.modules and (backend := _loaded(package)).handles(module):
            return backend
    return SEALED if SEALED.handles(module) else None


@cache
def _packages() -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.name for entry in entry_points(group=GROUP)))


@cache
def _loaded(package: str) -> Backend:
    from inlay.registry import load_one

    found: Backend = load_one(GROUP, "backend", package)
    return found


__all__ = ["GROUP", "Backend", "Sealed", "backend_of"]
