"""What parts keep during one generation: beside its cache, where copies and beams take it along."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

NAME = "_inlay_kept"


class Kept(dict[Any, Any]):
    """What one part keeps at one site. Its tensors have a row for each row the part sees there."""

    rows: Tensor | None = None  # their numbers in the batch, ascending; None for all of them

    def reorder(self, order: Tensor) -> None:
        """Take the rows in the order beam search gives; beams move only within a sample."""
        if self.rows is not None:
            order = torch.searchsorted(self.rows, order.to(self.rows.device)[self.rows])
        for name, value in self.items():
            if isinstance(value, Tensor):
                self[name] = value.index_select(0, order.to(value.device))


class Follows:
    """Mixin of caches: what is kept beside them goes where their rows go."""

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        for kept in beside(self).values():
            if isinstance(kept, Kept):
                kept.reorder(beam_idx)
        return super().reorder_cache(beam_idx)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_rebuild, type(self).__bases__[1:], *super().__reduce_ex__(protocol)[2:])


def beside(cache: Any) -> dict[Any, Any]:
    """Return what is kept beside a generation's cache, to be filled."""
    if getattr(cache, NAME, None) is None:
        setattr(cache, NAME, {})
    found: dict[Any, Any] = getattr(cache, NAME)
    return found


def follow(cache: Any) -> None:
    """Let what is kept beside `cache` be reordered with it."""
    if not isinstance(cache, Follows):
        cache.__class__ = _following(type(cache))  # type: ignore[arg-type]


@cache
def _following(kind: Any) -> Any:
    return type(kind.__name__, (Follows, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _rebuild(kind: Any) -> Any:
    following = _following(kind)
    return following.__new__(following)
