"""What every run measures beside its metric: file size, whether it merges, the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def file_bytes(folder: Path) -> int:
    """Return the size of the tensors saved in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def merges(parts: Sequence[str], mergeable: Sequence[str]) -> str:
    """Say whether a stack folds into the base's weights: "yes", "no", or which parts of it do.

    A head folds beside every stack, so it says nothing of the stack.
    """
    own = [name for name in parts if name != "trained"]
    folding = [name for name in own if name in mergeable]
    if len(folding) == len(own):
        return "yes"
    return ", ".join(folding) + " only" if folding else "no"
