"""Folding: a trained prefix without the generator that made it."""

from __future__ import annotations

from torch import nn

from inlay.errors import StateError
from inlay.stack import need_state
from inlay.training import advance
from inlay_prefix.keyvalues import PrefixMethod


def fold(model: nn.Module, name: str) -> None:
    """Replace the generators of the adapter or part `name` by the keys and values they make.

    The model computes the same in evaluation mode; p·2·L·H_kv·D numbers are left, which can be
    trained further with a new optimizer but not be turned back. The same as ending the method's
    stage with `inlay.advance`. Raises `StateError` if `name` has no generator.
    """
    found = [p for p in need_state(model).find(name) if isinstance(p.method, PrefixMethod)]
    made = [p.path for p in found if len(p.adapter.shared)]
    if not made:
        raise StateError(
            f"{name!r} has no prefix generator to fold",
            saw=f"prefixes there: {', '.join(p.path + ' (flat)' for p in found) or 'none'}",
            do="fold once, after training with reparam=True or prefix_projection=True",
        )
    for path in made:
        advance(model, path)
