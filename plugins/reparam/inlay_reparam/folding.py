"""Folding: what a HiWi adapter learned, without the adapter."""

from __future__ import annotations

from torch import nn

from inlay.errors import StateError
from inlay.stack import need_state
from inlay.training import advance
from inlay_reparam.hiwi import HiWi


def fold(model: nn.Module, name: str) -> None:
    """Replace D and U of the HiWi adapter or part `name` by the differences θ' − θ they make.

    The model computes the same; what is saved no longer depends on the rank. The same as ending the
    method's stage with `inlay.advance`. Raises `StateError` if nothing of `name` can be folded.
    """
    found = [p for p in need_state(model).find(name) if isinstance(p.method, HiWi)]
    left = [p.path for p in found if not p.adapter.data.get("folded")]
    if not left:
        raise StateError(
            f"{name!r} has no parameter adapter to fold",
            saw=f"hiwi there: {', '.join(p.path + ' (folded)' for p in found) or 'none'}",
            do="fold once, after training",
        )
    for path in left:
        advance(model, path)
