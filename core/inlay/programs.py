"""Programs: what one host module runs for one choice of active adapters, compiled at activation.

A site is an onion. f₀ is the base; member i makes fᵢ(x) = fᵢ₋₁(x + Δxᵢ) + Δyᵢ(x, fᵢ₋₁(x)). The
hot path holds no plugin call, no attribute probing and no search by name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.context import At, Slot
from inlay.delta import Change, Delta, WeightDelta
from inlay.sites import ModuleSite, Site
from inlay.weights import Level, as_stored, holds_bias

Base = Callable[..., Any]


@dataclass
class Table:
    """The compiled programs of one choice: `programs[i]` belongs to host i.

    `attention[i]` belongs to attention port i and `blocks[i]` to block port i. `prepares` are the
    values to compute at the start of a call; `scoped` says whether a call must be opened at all,
    `reads_call` whether a delta asks about it.
    """

    programs: list[Any]
    attention: list[Any]
    blocks: list[Any]
    prepares: tuple[tuple[Hashable, Callable[[Any], Any]], ...] = ()
    scoped: bool = False
    reads_call: bool = False


@dataclass
class Member:
    """One delta at one site, with everything it may ask for."""

    delta: Delta
    at: At
    part: tuple[int, int] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y with this member's change."""
        if self.part is None:
            return y + self.change(x, y)
        start, stop = self.part
        inner = y[..., start:stop]
        inner = inner + self.change(x, inner)
        return torch.cat((y[..., :start], inner, y[..., stop:]), dim=-1)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        change: Tensor = self.delta(x, y, self.at)
        return change


class WeightMember(Member):
    """A weight delta on a linear layer, acting by its effect on the output."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        change: Change = self.delta(self.at)
        site = self.at.site
        return change.effect(x, (site.out_features, site.in_features))


class Program:
    """The onion of one leaf module: input changes outside in, the base, output changes inside out."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.inputs = any(m.delta.face == "input" for m in members)

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, args, kwargs = take_first(args, kwargs)
        return self.run(lambda inner: base(inner, *args, **kwargs), x)

    def run(self, base: Base, x: Tensor) -> Tensor:
        """Return f(x) given f₀ = `base`."""
        if not self.inputs:
            return self.outputs(x, base(x))
        seen: list[Tensor] = []
        for member in reversed(self.members):
            seen.append(x)
            if member.delta.face == "input":
                x = x + member.delta(x, member.at)
        y: Tensor = base(x)
        for member, x in zip(self.members, reversed(seen), strict=True):
            if member.delta.face != "input":
                y = member(x, y)
        return y

    def outputs(self, x: Tensor, y: Tensor) -> Tensor:
        """Apply the output changes to y; only for programs without input changes."""
        for member in self.members:
            y = member(x, y)
        return y


class Overlay(Program):
    """A leaf run with changed tensors, for members that have no additive form there, then the onion.

    The module itself is not touched: a shadow object with its attributes and other parameters
    runs, so that threads with different adapters can share one model.
    """

    def __init__(self, folded: Sequence[Member], above: Sequence[Member]) -> None:
        super().__init__(above)
        self.levels: list[Level] = []
        for site in {m.at.site.name: m.at.site for m in folded}.values():
            assert isinstance(site, ModuleSite)
            self.levels.append(Level(site, [m.delta for m in folded if m.at.site.name == site.name]))
        names = {n for level in self.levels for n in (level.site.weight_name, level.site.bias_name)}
        kind: Any = self.levels[0].site.module._inlay_base
        while any(isinstance(vars(kind).get(name), property) for name in names if name):
            kind = kind.__bases__[0]
        self.kind = kind

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shadow, shift = self.shadow(module)
        forward = type(shadow).forward
        if not self.members and shift is None:
            return forward(shadow, *args, **kwargs)
        x, args, kwargs = take_first(args, kwargs)

        def changed(inner: Tensor) -> Any:
            y = forward(shadow, inner, *args, **kwargs)
            return y if shift is None else y + shift.to(y.dtype)

        return self.run(changed, x)

    def shadow(self, module: nn.Module) -> tuple[Any, Tensor | None]:
        """Return an object of the module's own class that holds the changed tensors, and a bias it cannot.

        Nothing may compute them again: neither a parametrization, whose class has a property of
        that name, nor an attribute that a hook sets (both weight norms of torch).
        """
        changed: dict[str, Tensor] = {}
        shift: Tensor | None = None
        for level in self.levels:
            weight, bias = level.tensors()
            if not holds_bias(level.site):
                shift, bias = bias, None
            changed.update(as_stored(level.site, weight, bias, changed))
        shadow: Any = object.__new__(self.kind)
        attributes = {k: v for k, v in module.__dict__.items() if k not in changed}
        shadow.__dict__ = {**attributes, "_parameters": {**module._parameters, **changed}}
        return shadow, shift


class OnOutput:
    """Members on a module that gives a tensor or a tuple: sublayers and blocks."""

    def __init__(self, members: Sequence[Member], site: Site, slot: Slot, *, own_input: bool) -> None:
        self.members, self.site, self.slot, self.own_input = tuple(members), site, slot, own_input

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = base(*args, **kwargs)
        x = take_first(args, kwargs)[0] if self.own_input else self.slot.taps[f"{self.site.name}/x"]
        return self.on(x, output)

    def on(self, x: Tensor, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        for member in self.members:
            y = member(x, y)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class Tapped:
    """Keep an argument of the module's call for a sublayer's deltas, then run what else is here."""

    def __init__(self, taps: Sequence[tuple[str, int, str]], slot: Slot, inner: Any) -> None:
        self.taps, self.slot, self.inner = tuple(taps), slot, inner

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for key, position, name in self.taps:
            if name in kwargs:
                value = kwargs[name]
            else:
                value = args[position] if position < len(args) else next(iter(kwargs.values()))
            self.slot.taps[key] = value
        if self.inner is None:
            return base(*args, **kwargs)
        return self.inner(module, base, args, kwargs)


class ByRows:
    """What routed programs share: running a program on some rows, and saying so to its deltas."""

    slot: Slot

    def on_rows(self, rows: Tensor, run: Callable[..., Any], *args: Any) -> Any:
        before = self.slot.rows
        self.slot.rows = rows if before is None else before.index_select(0, rows)
        try:
            return run(*args)
        finally:
            self.slot.rows = before


class Routed(ByRows):
    """Rows of one batch under different programs of one leaf module.

    Where every program only adds to the output, the base runs once for all rows; else it runs
    once per distinct program on that program's rows.
    """

    def __init__(self, programs: Sequence[Program | None], slot: Slot, site: Site) -> None:
        self.programs, self.slot, self.site = tuple(programs), slot, site
        self.once = all(p is None or (type(p) is Program and not p.inputs) for p in programs)

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, args, kwargs = take_first(args, kwargs)
        groups = row_groups(self.slot, self.site, self.programs, x)
        if self.once:
            y = base(x, *args, **kwargs)
            for program, rows in groups:
                if program is not None:
                    changed = self.on_rows(
                        rows, program.outputs, x.index_select(0, rows), y.index_select(0, rows)
                    )
                    y = y.index_copy(0, rows, changed)
            return y
        parts = [
            base(x.index_select(0, rows), *args, **kwargs)
            if program is None
            else self.on_rows(rows, program, module, base, (x.index_select(0, rows), *args), kwargs)
            for program, rows in groups
        ]
        return torch.cat(parts).index_select(0, torch.cat([rows for _, rows in groups]).argsort())


class RoutedOnOutput(ByRows):
    """Rows of one batch under different members of one sublayer or block."""

    def __init__(
        self, programs: Sequence[OnOutput | None], slot: Slot, site: Site, *, own_input: bool
    ) -> None:
        self.programs, self.slot, self.site, self.own_input = tuple(programs), slot, site, own_input

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = base(*args, **kwargs)
        x = take_first(args, kwargs)[0] if self.own_input else self.slot.taps[f"{self.site.name}/x"]
        return self.on(x, output)

    def on(self, x: Tensor, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        taps, name = self.slot.taps, f"{self.site.name}/residual"
        residual = taps.get(name)
        for program, rows in row_groups(self.slot, self.site, self.programs, x):
            if program is not None:
                if residual is not None:
                    taps[name] = residual.index_select(0, rows)
                changed = self.on_rows(rows, program.on, x.index_select(0, rows), y.index_select(0, rows))
                y = y.index_copy(0, rows, changed)
        return (y, *output[1:]) if isinstance(output, tuple) else y


def row_groups(slot: Slot, site: Site, programs: Sequence[Any], x: Tensor) -> list[tuple[Any, Tensor]]:
    """Return (program, its row numbers) for the batch under way, in order of the stacks."""
    call = slot.call
    assert call is not None
    if slot.rows is None:
        rows = call.expanded_rows(x.shape[0], site.name)
    else:  # a delta on some rows runs a module of the base (a norm) that is routed itself
        every = call.expanded_rows(call.batch or len(call.rows or ()), site.name)
        rows = tuple(every[row] for row in slot.rows.tolist())
    groups: list[tuple[Any, Tensor]] = []
    for stack, program in enumerate(programs):
        mine = [i for i, row in enumerate(rows) if row == stack]
        if mine:
            groups.append((program, call.index(mine, x.device)))
    return groups


def take_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Split a call into its first argument, positional or by name, and the rest."""
    if args:
        return args[0], args[1:], kwargs
    name = next(iter(kwargs))
    return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}


def leaf_program(members: Sequence[Member]) -> Program | None:
    """Return the program of a leaf module: an onion, with an overlay up to the last member that needs it."""
    if not members:
        return None
    last = max((i for i, m in enumerate(members) if needs_overlay(m)), default=-1)
    if last < 0:
        return Program(members)
    return Overlay(members[: last + 1], members[last + 1 :])


def needs_overlay(member: Member) -> bool:
    """Whether a member can act only by running its layer with changed tensors."""
    site, delta = member.at.site, member.delta
    if not isinstance(delta, WeightDelta):
        return False
    return delta.replaces or not (isinstance(site, ModuleSite) and site.is_linear)
