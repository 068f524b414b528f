"""Kinds of leaf layers: what a module is, by its class and its weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from inlay.backends import SEALED


def layer_kind(module: nn.Module) -> str | None:
    """Return the kind of leaf layer `module` is, or None."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if SEALED.handles(module):  # a quantised layer of a class of its own
        return "linear"
    name = type(module).__name__
    weight = module._parameters.get("weight")
    if name == "Conv1D" and weight is not None and weight.dim() == 2:
        return "conv1d"
    return "norm" if "Norm" in name and weight is not None and weight.dim() == 1 else None


def shape_of(module: nn.Module, kind: str) -> tuple[int, int]:
    """Return (out, in) of a linear layer."""
    if kind == "conv1d":
        weight: Any = module.weight
        return int(weight.shape[1]), int(weight.shape[0])
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def token_embedding(model: Any) -> nn.Embedding | None:
    """Return the table of tokens a transformers model says it reads, if it has one."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None
