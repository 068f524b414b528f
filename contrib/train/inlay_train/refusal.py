"""Errors in three beats from code that imports inlay, and so torch, only when it has to complain."""

from __future__ import annotations

from pathlib import Path


def refusal(what: str, *, saw: str, do: str) -> Exception:
    """Return an `InlayError`: what is wrong, what was seen, what to do."""
    from inlay.errors import InlayError

    return InlayError(what, saw=saw, do=do)


def check_new(output: Path, *, do: str) -> None:
    """Refuse an output that holds anything."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise refusal("the output is not a new or empty folder", saw=ascii(str(output)), do=do)
