"""Choosing adapters for a while, in this thread, in the forward pass only: `use` and `route`."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from inlay.context import Call
from inlay.errors import MergedError, RoutingError, shown
from inlay.stack import State, need_state


class use:  # noqa: N801 - a verb, used as `with use(model, "fr"):`
    """Only the named adapters or parts take part, in the order given; `use(model)` is the bare base.

    Holds for this thread until the block ends; nestable; never touches `requires_grad`.
    """

    def __init__(self, model: nn.Module, *names: str) -> None:
        state = need_state(model)
        stack = _stack(state, names)
        _refuse_without_merged(state, stack)
        self._state, self._call = state, Call(state.table_for((stack,)), state.slot)
        self._outer: list[Call | None] = []

    def __enter__(self) -> None:
        self._outer.append(self._state.slot.call)
        self._state.slot.call = self._call

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state.slot.call = self._outer.pop()


class route(use):  # noqa: N801 - a verb
    """Each row of the batch goes through its own adapters: `route(model, ["fr", "de", None])`.

    `names` gives one entry per row: an adapter or part, None for the bare base, or a tuple of
    names stacked in that order; a single name serves the whole batch. Under `generate` a route of
    n rows serves k·n beams. `tasks` are task ids for methods that read them, one per row.
    """

    def __init__(
        self,
        model: nn.Module,
        names: str | Sequence[str | tuple[str, ...] | None] | None,
        *,
        tasks: Sequence[int] | Tensor | None = None,
    ) -> None:
        state = need_state(model)
        single = names is None or isinstance(names, str)
        rows = [names] if single else list(names) if isinstance(names, Sequence) else []  # type: ignore[list-item]
        if not rows or not all(r is None or isinstance(r, (str, tuple)) for r in rows):
            raise RoutingError(
                "a route needs a name per row",
                saw=shown(names),
                do='give one entry per sample: a name, None, or a tuple of names, as in ["fr", None]',
            )
        ids = None if tasks is None else _ids(tasks, None if single else len(rows))
        stacks = [_stack(state, _names(row)) for row in rows]  # type: ignore[arg-type]
        for stack in stacks:
            _refuse_without_merged(state, stack)
        distinct = tuple(sorted(set(stacks)))
        which = None if single or len(distinct) == 1 else tuple(distinct.index(s) for s in stacks)
        self._state = state
        self._call = Call(state.table_for(distinct), state.slot, rows=which, tasks=ids)
        self._outer = []


def _ids(tasks: Sequence[int] | Tensor, rows: int | None) -> Tensor:
    """Return the task ids as a tensor, if they are one integer per row (`rows` None: any number)."""
    try:
        ids = torch.as_tensor(tasks)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ids = torch.empty(0)
    if ids.dim() != 1 or ids.is_floating_point() or not len(ids) or len(ids) != (rows or len(ids)):
        raise RoutingError(
            "a route needs a task id per row",
            saw=f"tasks={shown(tasks)}, rows: {rows or 'any'}",
            do="give one integer per sample",
        )
    return ids


def _names(row: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if row is None:
        return ()
    return (row,) if isinstance(row, str) else tuple(row)


def _stack(state: State, names: Sequence[str]) -> tuple[int, ...]:
    return tuple(p.id for p in state.find_all(names))


def _refuse_without_merged(state: State, stack: tuple[int, ...]) -> None:
    missing = [p.path for p in state.placed.values() if p.merged and p.id not in stack]
    if missing:
        raise MergedError(
            "this choice leaves out adapters that are merged into the base",
            saw=f"merged: {', '.join(map(repr, missing))}",
            do="inlay.unmerge(model) first, or include them",
        )
