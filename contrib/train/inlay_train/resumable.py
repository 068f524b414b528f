"""Checkpoints a run can go on from: which are complete, and what to say when one cannot be written."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

from inlay import InlayError

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
