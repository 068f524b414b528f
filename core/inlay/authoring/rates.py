"""Optimizer groups that several methods have: one kind of tensor at a rate and weight decay of its own."""

from __future__ import annotations

from inlay.adapter import Adapter
from inlay.method import Method
from inlay.training import Group


def two_rates(
    method: Method, adapter: Adapter, lr: float | None, ending: str, ratio: float, decay: float | None = None
) -> list[Group]:
    """Return the parameters whose names end so in a group with `ratio` times the rate of the others."""
    rate, names = method.lr if lr is None else lr, adapter.trainable_names()
    apart = [n for n in names if n.endswith(ending)]
    others = [n for n in names if n not in apart]
    return [Group(others, rate, method.weight_decay), Group(apart, rate * ratio, decay)]
