"""Refusals: an error in three beats that leaves the model and the disk as they were."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from inlay.errors import InlayError
from inlay.stack import state_of
from inlay.testing.rule import need
from inlay.testing.snapshots import differences, snapshot


class Caught:
    """Holds the error once the block has raised it."""

    error: InlayError


@contextmanager
def refused(
    kind: type[InlayError],
    match: str,
    *,
    model: nn.Module | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Iterator[Caught]:
    """Raise unless the block raises `kind` with a text that `match` is found in, and changes nothing.

    The text must have its three beats. Nothing may differ in `model` (compared by a full snapshot, and
    by what inlay knows about it) nor in `folder` (every path below it, its sort and its bytes).
    """
    shot = None if model is None else snapshot(model)
    known, files = facts(model), listing(folder)
    caught = Caught()
    try:
        yield caught
    except kind as raised:
        caught.error = raised
    need(hasattr(caught, "error"), f"nothing was raised; expected {kind.__name__} matching {match!r}")
    text, error = str(caught.error), caught.error
    need(re.search(match, text), f"{match!r} is not found in:\n{text}")
    need(
        all(beat.strip() for beat in (error.what, error.saw, error.do)),
        f"one of the three beats is empty:\n{text}",
    )
    need(text == f"{error.what}\n  saw: {error.saw}\n  do:  {error.do}", f"not in three beats:\n{text}")
    need(
        all(c.isprintable() or c == "\n" for c in text),
        f"control characters would reach a terminal: {text!r}",
    )
    if shot is not None and model is not None:
        need(not (found := differences(shot, model)), f"the model was changed: {found[:5]}")
    need(facts(model) == known, "what inlay knows about the model was changed")
    need(listing(folder) == files, "the folder was changed")


def facts(model: nn.Module | None) -> Any:
    """Return what inlay knows about a model: parts, their flags, order and hosts."""
    state = None if model is None else state_of(model)
    if state is None:
        return None
    parts = [(p.id, p.path, p.method, p.trainable, p.merged) for p in state.placed.values()]
    ports = [(type(port), port.name, id(port.module)) for port in state.ports]
    return parts, state.active, state.next_id, ports, bool(state.merge_undo)


def listing(folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return every path below `folder` with its sort, mode and content."""
    if folder is None or not Path(folder).exists():
        return {}
    return {str(p): _entry(p) for p in [Path(folder), *sorted(Path(folder).rglob("*"))]}


def _entry(path: Path) -> Any:
    mode = path.lstat().st_mode
    if path.is_symlink():
        return mode, os.readlink(path)
    return mode, path.read_bytes() if path.is_file() else None
