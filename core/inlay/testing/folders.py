"""Checkpoint folders taken apart and put together again, with the digests they should have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from inlay import manifest, tensorfile
from inlay.manifest import FILE


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return what a folder's manifest says."""
    found: dict[str, Any] = json.loads((folder / FILE).read_text())
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return a folder's tensors by their keys in the file."""
    found: dict[str, Tensor] = load((folder / manifest_of(folder)["tensors"]).read_bytes())
    return found


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
