"""Checkpoint folders taken apart and put together again, as one who means harm would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import inlay
from inlay import manifest, tensorfile
from inlay.manifest import FILE
from inlay.stack import need_state
from inlay_lora import LoRA

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


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / FILE).read_text())
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load((folder / manifest_of(folder)["tensors"]).read_bytes())


def put(folder: Path, content: dict[str, Any], data: bytes | None = None) -> None:
    """Write a manifest, with the digests it should have, and the tensors if given."""
    folder.mkdir(parents=True, exist_ok=True)
    if data is not None:
        content["tensors"] = tensorfile.file_name(data)
        (folder / content["tensors"]).write_bytes(data)
    content["digest"] = manifest.digest_of(content)
    (folder / FILE).write_text(json.dumps(content, indent=1))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a folder's manifest, and give it the digest that belongs to it."""
    content = manifest_of(folder)
    change(content)
    put(folder, content)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change a folder's tensors, and give the manifest the digests that belong to them."""
    content, tensors = manifest_of(folder), tensors_of(folder)
    (folder / content["tensors"]).unlink()
    change(tensors)
    put(folder, content, save(tensors))


def saved(folder: Path, stack: Any = STACK) -> Path:
    """Save the usual stack to `folder`."""
    inlay.save(adapted(stack), folder)
    return folder
