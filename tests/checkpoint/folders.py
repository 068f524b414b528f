"""A small base and checkpoints of it, to take apart and put together as one who means harm would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import inlay
from inlay.stack import need_state
from inlay.testing.folders import edit, edit_tensors, manifest_of, put, tensors_of
from inlay_lora import LoRA

__all__ = ["STACK", "adapted", "base", "edit", "edit_tensors", "manifest_of", "put", "saved", "tensors_of"]
STACK = LoRA(rank=1, targets=["0", "1"])


def base(width: int = 64) -> nn.Module:
    """Return a small base whose weights are the same everywhere and always."""
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_((torch.arange(p.numel()) % 7 - 3 + number).view(p.shape) / 64)
    return model


def adapted(stack: Any = STACK, name: str = "fr", model: nn.Module | None = None) -> nn.Module:
    """Return a base with a stack whose every tensor is off its start."""
    model = base() if model is None else model
    inlay.attach(model, stack, name, seed=0)
    with torch.no_grad():
        for _, _, p in need_state(model).own_parameters():
            p.copy_((torch.arange(p.numel()) % 5 - 2).view(p.shape) / 16)
    return model


def saved(folder: Path, stack: Any = STACK) -> Path:
    """Save the usual stack to `folder`."""
    inlay.save(adapted(stack), folder)
    return folder
