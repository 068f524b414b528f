"""The rank, width or length at which a stack has a given number of trainable parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import inlay
from inlay import InlayError
from inlay.authoring import ConfigError, Method

SIZES = ("rank", "width", "length")  # what methods call their size; the first one a method has is its dial
SHORT_BY = 0.1  # a stack may stay this share under its budget: sizes are whole numbers
MOST, BEYOND = 2**20, 2**60


def fitted(model: nn.Module, stack: str, budget: int) -> str:
    """Return `stack` with the largest sizes whose parameters, without the head's, stay within `budget`.

    Parts without a size keep what they have; the others share the rest evenly, the coarsest first, so that
    the finest takes up what is left over. Raises `InlayError` naming the nearest sizes if the result
    would have more than `budget` parameters, or less than 90 % of them. `model` may be on the meta device.
    """
    counts = [Counted(model, p.part.name, p.part.method) for p in inlay.plan(model, stack).parts]
    sized = sorted((c for c in counts if c.dial), key=lambda c: -c.step)
    rest = budget - sum(c.at(None) for c in counts if not c.dial)
    for number, counted in enumerate(sized):
        counted.size = largest(counted.at, rest // (len(sized) - number))
        rest -= counted.at(counted.size)
    for counted in sized:  # what layers too small for a larger size have left over
        here = counted.at(counted.size)
        counted.size = largest(counted.at, here + rest)
        rest -= counted.at(counted.size) - here
    if rest < 0 or rest > SHORT_BY * budget:
        raise _unmet(stack, counts, budget, budget - rest)
    return " + ".join(written(c.name, c.method_at(c.size)) for c in counts)


class Counted:
    """One part of a stack and its parameters at each size."""

    def __init__(self, model: nn.Module, name: str, method: Method) -> None:
        self.model, self.name, self.method = model, name, method
        names = {f.name for f in dataclasses.fields(method)}
        self.dial = next((size for size in SIZES if size in names), "")
        self.size: int | None = None
        self.known: dict[int | None, int] = {}

    @property
    def step(self) -> int:
        return self.at(2) - self.at(1)

    def method_at(self, size: int | None) -> Method:
        return self.method if size is None else dataclasses.replace(self.method, **{self.dial: size})

    def at(self, size: int | None) -> int:
        """Return the parameters at `size`; `BEYOND` any budget where a layer is too small for it."""
        if size not in self.known:
            try:
                self.known[size] = inlay.plan(self.model, self.method_at(size)).parameters
            except ConfigError:
                if size in (None, 1):
                    raise
                self.known[size] = BEYOND
        return self.known[size]

    def sizes(self) -> str:
        """Say which sizes are nearest, and what they have."""
        if self.size is None:
            return f"{self.name} has no size to choose: {self.at(None):,} parameters"
        sizes = [size for size in (self.size, self.size + 1) if self.at(size) < BEYOND]
        near = [f"{self.dial}={size}: {self.at(size):,}" for size in sizes]
        return f"{self.name} with {' and '.join(near)} parameters"


def largest(count: Callable[[int], int], budget: int) -> int:
    """Return the largest n ≥ 1 with count(n) ≤ budget, for a count that never falls; 1 if there is none."""
    high = 1
    while high < MOST and count(high) <= budget:
        high *= 2
    low = max(1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    return low


def written(name: str, method: Method) -> str:
    """Return the text that `inlay.attach` reads as this method: its id and what is not default."""
    given = [
        f"{field.name}={_value(getattr(method, field.name))}"
        for field in dataclasses.fields(method)
        if getattr(method, field.name) != field.default
    ]
    text = f"{method.id}({', '.join(given)})"
    return text if name == method.id else f"{text}.named({name!r})"


def _value(value: Any) -> str:
    if isinstance(value, Method):
        return written(value.id, value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return repr(value)


def _unmet(stack: str, counts: Sequence[Counted], budget: int, nearest: int) -> InlayError:
    fits = f"--budget {nearest} fits it; " if any(c.dial for c in counts) else ""
    return InlayError(
        f"no size of {stack} meets a budget of {budget:,} parameters",
        saw="; ".join(c.sizes() for c in counts),
        do=f"{fits}give another budget, leave it out, or compare without --budget",
    )
