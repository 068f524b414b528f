"""Checkpoints a run can go on from: which are complete, and what to say when one cannot be written."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from inlay import InlayError, identity
from inlay.stack import need_state
from inlay_train import checkpoints as saved

MARK = "trainer_state.json"  # what transformers writes last
LIFECYCLE = "lifecycle.pt"  # what methods keep from step to step
WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    try:
        return isinstance(json.loads((checkpoint / MARK).read_bytes()), dict)
    except (OSError, ValueError):
        return False


def checkpoints(folder: Path) -> list[Path]:
    """Return the folder's checkpoints by step, complete or not."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def last(folder: Path) -> Path | None:
    """Return the last complete checkpoint of a folder, or None."""
    return next((found for found in reversed(checkpoints(folder)) if is_complete(found)), None)


def not_written(error: BaseException | None) -> str:
    """Return why a file could not be written, or "" if the error is another one.

    torch tells so by a RuntimeError without a number.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in WRITING:
            return str(error.strerror)
        if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|inline_container", str(error)):
            return str(error).splitlines()[0][:200]
        error = error.__cause__ or error.__context__
    return ""


def cannot_write(folder: Path, reason: str, good: Path | None) -> InlayError:
    """Return the error for a file of a run that could not be written."""
    there = next(p for p in (folder, *folder.parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    return InlayError(
        "the run's files cannot be written; is the disk full?",
        saw=f"{folder}: {reason}; {free / 2**20:,.0f} MiB are free there",
        do="make room, then resume"
        + (f": {good} is whole" if good is not None else "; there is no checkpoint yet"),
    )


def check_same(model: nn.Module, adapter: str, folder: Path) -> None:
    """Raise if a checkpoint is not of the stack attached as `adapter`, on this base; list what differs."""
    if found := list(_differences(model, adapter, folder)):
        raise InlayError(
            "the checkpoint is of another stack or base, so training cannot go on from it",
            saw="".join(f"\n  {line}" for line in (str(folder), *found)),
            do="load the same base and attach the same stack, or train anew",
        )


def _differences(model: nn.Module, adapter: str, folder: Path) -> Iterator[str]:
    there, here = saved.read(folder), need_state(model).find(adapter)
    yield from (f"base: {line}" for line in identity.differences(there.base, model))
    methods = [part.method for part in there.parts], [placed.method.id for placed in here]
    if methods[0] != methods[1]:
        yield f"stack: {' + '.join(methods[0])} then, {' + '.join(methods[1])} now"
        return
    for part, placed in zip(there.parts, here, strict=True):
        now = json.loads(json.dumps(placed.method.to_dict()))
        for name in sorted({*part.settings, *now}):
            if part.settings.get(name) != now.get(name):
                yield f"{part.name}: {name}: {part.settings.get(name)!r} then, {now.get(name)!r} now"
        if other := sorted({*part.sites} ^ {site.name for site in placed.adapter.sites}):
            yield f"{part.name}: other places, such as {other[0]}"
