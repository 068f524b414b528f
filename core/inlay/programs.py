"""Programs: what one host module runs for one choice of active adapters, compiled at activation.

A site is an onion. f₀ is the base; member i makes fᵢ(x) = fᵢ₋₁(x + Δxᵢ) + Δyᵢ(x, fᵢ₋₁(x)). The
hot path holds no plugin call, no attribute probing and no search by name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.context import At, Slot, take_first
from inlay.delta import Change, Delta, WeightDelta
from inlay.sites import ModuleSite, Site, Slice, SublayerSite
from inlay.weights import Dequantised, Level, as_stored, holds_bias

Base = Callable[..., Any]


@dataclass
class Table:
    """The compiled programs of one choice: `programs[i]` belongs to port i.

    `prepares` are the values to compute at the start of a call; `scoped` says whether a call must be
    opened at all, `reads_call` whether a delta asks about it.
    """

    programs: list[Any]
    prepares: tuple[tuple[Hashable, Callable[[Any], Any]], ...] = ()
    scoped: bool = False
    reads_call: bool = False


@dataclass
class Member:
    """One delta at one site, with everything it may ask for."""

    delta: Delta
    at: At
    part: Slice | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y with this member's change."""
        if self.part is None:
            return y + self.change(x, y)
        inner = self.part.take(y, -1)
        return self.part.put(y, inner + self.change(x, inner), -1)

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
    """What one module runs: the base, then changes of its output.

    A layer's x is what it is called with; what a sublayer reads was kept in passing by another
    module (`reads` is its key in `slot.taps`). Sublayers and blocks may give a tuple.
    """

    def __init__(self, slot: Slot, reads: str | None = None) -> None:
        self.slot, self.reads = slot, reads

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.outputs(take_first(args, kwargs)[0], base(*args, **kwargs))

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a block is called with; only its output is changed here."""
        return args, kwargs

    def outputs(self, x: Tensor, output: Any) -> Any:
        """Return the output changed."""
        if self.reads is not None:
            x = self.slot.taps[self.reads]
        if not isinstance(output, tuple):
            return self.changed(x, output)
        return (self.changed(x, output[0]), *output[1:])

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


class Onion(Program):
    """Members around one module: input changes outside in, the base, output changes inside out."""

    def __init__(self, members: Sequence[Member], slot: Slot, reads: str | None = None) -> None:
        super().__init__(slot, reads)
        self.members = tuple(members)
        self.reaches_in = any(m.delta.face == "input" for m in members)

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.reaches_in:
            return super().__call__(module, base, args, kwargs)
        x, args, kwargs = take_first(args, kwargs)
        return self.run(lambda inner: base(inner, *args, **kwargs), x)

    def run(self, base: Base, x: Tensor) -> Tensor:
        """Return f(x) given f₀ = `base`, of a layer that gives a tensor."""
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

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        for member in self.members:
            y = member(x, y)
        return y


class Overlay(Onion):
    """A leaf run with changed tensors, for members that have no additive form there, then the onion.

    The module itself is not touched: a shadow object with its attributes and other parameters
    runs, so that threads with different adapters can share one model.
    """

    def __init__(self, folded: Sequence[Member], above: Sequence[Member], slot: Slot) -> None:
        super().__init__(above, slot)
        self.levels = levels_of(folded)
        names = {n for level in self.levels for n in (level.site.weight_name, level.site.bias_name)}
        kind: Any = self.levels[0].site.module._inlay_base
        while any(isinstance(vars(kind).get(name), property) for name in names if name):
            kind = kind.__bases__[0]
        self.kind = kind if self.levels[0].backend is None else Dequantised

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shadow, shift = self.shadow(module)
        forward = type(shadow).forward
        if not self.reaches_in and shift is None:
            return self.outputs(take_first(args, kwargs)[0], forward(shadow, *args, **kwargs))
        x, args, kwargs = take_first(args, kwargs)

        def changed(inner: Tensor) -> Any:
            y = forward(shadow, inner, *args, **kwargs)
            return y if shift is None else y + shift.to(y.dtype)

        return self.run(changed, x)

    def shadow(self, module: nn.Module) -> tuple[Any, Tensor | None]:
        """Return an object of the module's class that holds the changed tensors, and a bias it cannot.

        Nothing may compute them again: neither a parametrization, whose class has a property of
        that name, nor an attribute that a hook sets (both weight norms of torch).
        """
        shift: Tensor | None = None
        levels: list[tuple[ModuleSite, Tensor, Tensor | None]] = []
        for level in self.levels:
            weight, bias = level.tensors()
            if not holds_bias(level.site):
                shift, bias = bias, None
            levels.append((level.site, weight, bias))
        changed = as_stored(levels, self.levels[0].backend)
        return shadow_of(module, self.kind, changed), shift


def shadow_of(module: nn.Module, kind: Any, changed: Mapping[str, Tensor]) -> Any:
    """Return an object like `module`, of class `kind`, with changed tensors, some of modules inside it."""
    own = {name: tensor for name, tensor in changed.items() if "." not in name}
    inner: dict[str, dict[str, Tensor]] = {}
    for name in changed.keys() - own.keys():
        child, _, leaf = name.partition(".")
        inner.setdefault(child, {})[leaf] = changed[name]
    shadow: Any = object.__new__(kind)
    attributes = {k: v for k, v in module.__dict__.items() if k not in own}
    shadow.__dict__ = {**attributes, "_parameters": {**module._parameters, **own}}
    children = {
        n: shadow_of(module.get_submodule(n), type(module.get_submodule(n)), t) for n, t in inner.items()
    }
    if children:
        shadow.__dict__["_modules"] = {**module._modules, **children}
    return shadow


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


class Routed(Program):
    """Rows of one batch under different programs of one module.

    Where every program only adds to the output, the base runs once for all rows; else it runs
    once per distinct program on that program's rows.
    """

    def __init__(self, programs: Sequence[Program | None], slot: Slot, site: Site) -> None:
        super().__init__(slot, next((p.reads for p in programs if p is not None), None))
        self.programs, self.site = tuple(programs), site
        self.once = all(p is None or (type(p) is Onion and not p.reaches_in) for p in programs)

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(self.site, ModuleSite):
            return super().__call__(module, base, args, kwargs)
        x, args, kwargs = take_first(args, kwargs)
        x = for_each_row(self.slot, self.site, x)
        if self.once:
            return self.outputs(x, base(x, *args, **kwargs))
        groups = row_groups(self.slot, self.site, self.programs, x)
        parts = [
            self.on_rows(rows, base, x.index_select(0, rows), *args, **kwargs)
            if program is None
            else self.on_rows(rows, program, module, base, (x.index_select(0, rows), *args), kwargs)
            for program, rows in groups
        ]
        return torch.cat(parts).index_select(0, torch.cat([rows for _, rows in groups]).argsort())

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        taps, name = self.slot.taps, f"{self.site.name}/residual"
        residual = taps.get(name)
        for program, rows in row_groups(self.slot, self.site, self.programs, x):
            if program is not None:
                if residual is not None:
                    taps[name] = residual.index_select(0, rows)
                part = self.on_rows(rows, program.changed, x.index_select(0, rows), y.index_select(0, rows))
                y = y.index_copy(0, rows, part)
        return y

    def on_rows(self, rows: Tensor, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `run(*args, **kwargs)`; deltas, and routed modules inside, are told which rows they see."""
        before = self.slot.rows
        self.slot.rows = rows if before is None else before.index_select(0, rows)
        try:
            return run(*args, **kwargs)
        finally:
            self.slot.rows = before


def for_each_row(slot: Slot, site: Site, x: Tensor) -> Tensor:
    """Return x with a row for each of the batch, where one stands for all: position ids are (1, T).

    Only for tables outside the blocks: a relative position bias inside reads (T, S), no rows at all.
    """
    assert slot.call is not None
    rows = slot.call.batch if slot.rows is None else slot.rows.shape[0]
    shared = site.kind == "embedding" and site.layer is None and x.shape[0] == 1
    return x.expand(rows, *x.shape[1:]) if shared and rows else x


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


def program_of(members: Sequence[Member], slot: Slot) -> Onion | None:
    """Return the program of one module's members: an onion, with an overlay up to the last that needs it."""
    if not members:
        return None
    folded, above = split(members)
    if folded:
        return Overlay(folded, above, slot)
    site = members[0].at.site
    kept = isinstance(site, SublayerSite) and site.x.module is not site.module
    return Onion(members, slot, reads=f"{site.name}/x" if kept else None)


def split(members: Sequence[Member]) -> tuple[Sequence[Member], Sequence[Member]]:
    """Return the members up to the last that needs changed tensors, and those above it."""
    last = max((i for i, m in enumerate(members) if needs_overlay(m)), default=-1)
    return members[: last + 1], members[last + 1 :]


def levels_of(folded: Sequence[Member]) -> list[Level]:
    """Return the level of each site that folded members act on."""
    levels: list[Level] = []
    for site in {m.at.site.name: m.at.site for m in folded}.values():
        assert isinstance(site, ModuleSite)
        levels.append(Level(site, [m.delta for m in folded if m.at.site.name == site.name]))
    return levels


def by_weight(site: Site) -> bool:
    """Whether a site's changes can act only through its module's weights."""
    return isinstance(site, ModuleSite) and site.by_weight


def needs_overlay(member: Member) -> bool:
    """Whether a member can act only by running its layer with changed tensors."""
    site, delta = member.at.site, member.delta
    if by_weight(site) or not isinstance(delta, WeightDelta):
        return by_weight(site)
    return delta.replaces or not (isinstance(site, ModuleSite) and site.is_linear)
