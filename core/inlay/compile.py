"""Compiling a choice of stacks into one program per host: done at activation, never in a forward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.attention import Columns, PromptColumns, RoutedColumns, run_prompt
from inlay.context import At, Call
from inlay.delta import Delta
from inlay.errors import AttachError
from inlay.programs import (
    Member,
    OnOutput,
    Routed,
    RoutedOnOutput,
    Table,
    Tapped,
    WeightMember,
    leaf_program,
    needs_overlay,
)
from inlay.sites import AttentionSite, BlockSite, ModuleSite, SequenceSite, Site, SublayerSite
from inlay.weights import Level

if TYPE_CHECKING:
    from inlay.stack import Placed, State

Entry = tuple["Placed", Site, Delta]


def compile_table(state: State, stacks: Sequence[tuple[int, ...]], *, prompts: bool = True) -> Table:
    """Return the programs of `stacks`: one for all rows, or several among which rows choose."""
    plans = [StackPlan(state, stack) for stack in stacks]
    taps = taps_of(plans)
    table = Table(
        programs=[_host_program(state, module, plans, taps.get(id(module), [])) for _, module in state.hosts],
        attention=[_attention_program(state, p.site, plans, prompts) for p in state.attention_ports],
        blocks=[_output_program(state, p.site, plans) for p in state.block_ports],
    )
    table.prepares = tuple(_prepares(state, plans, prompts))
    table.reads_call = any(p.wants_call for p in plans)
    table.scoped = bool(table.prepares or taps or len(plans) > 1 or table.reads_call)
    return table


class StackPlan:
    """The deltas of one stack, by the module they act on, in stack order."""

    def __init__(self, state: State, stack: tuple[int, ...]) -> None:
        self.stack = stack
        self.placed = [state.placed[i] for i in stack if not state.placed[i].merged]
        self.entries: dict[int, list[Entry]] = {}
        self.sequence: list[Entry] = []
        for placed in self.placed:
            for site, delta in placed.adapter.placed:
                if isinstance(site, SequenceSite):
                    self.sequence.append((placed, site, delta))
                else:
                    self.entries.setdefault(id(site.module), []).append((placed, site, delta))
        self.wants_call = any(p.method.reads_call for p in self.placed)

    def at(self, module: nn.Module, kind: type[Site]) -> list[Entry]:
        return [e for e in self.entries.get(id(module), []) if isinstance(e[1], kind)]


def _host_program(state: State, module: nn.Module, plans: Sequence[StackPlan], taps: list[Any]) -> Any:
    leaf = next((e[1] for p in plans for e in p.at(module, ModuleSite)), None)
    sublayer = next((e[1] for p in plans for e in p.at(module, SublayerSite)), None)
    program: Any = None
    if leaf is not None:
        leaves = [leaf_program(members_of(state, p.at(module, ModuleSite))) for p in plans]
        program = leaves[0] if len(leaves) == 1 else Routed(leaves, state.slot, leaf)
    elif sublayer is not None:
        program = _output_program(state, sublayer, plans)
    return Tapped(taps, state.slot, program) if taps else program


def _output_program(state: State, site: Site, plans: Sequence[StackPlan]) -> Any:
    own = isinstance(site, BlockSite) or (isinstance(site, SublayerSite) and site.x.module is site.module)
    programs: list[OnOutput | None] = []
    for plan in plans:
        members = members_of(state, plan.at(site.module, type(site)))
        programs.append(OnOutput(members, site, state.slot, own_input=own) if members else None)
    if len(programs) == 1 or not any(programs):
        return programs[0]
    return RoutedOnOutput(programs, state.slot, site, own_input=own)


def members_of(state: State, entries: Sequence[Entry]) -> list[Member]:
    """Return the members of one module in stack order, each knowing the level below it."""
    members: list[Member] = []
    for i, (placed, site, delta) in enumerate(entries):
        level = None
        if isinstance(site, ModuleSite):
            below = [d for _, s, d in entries[:i] if s is site or s.name == site.name]
            if needs_level(delta):
                check_weight_form(delta, site, placed, entries[:i])
            level = Level(site, below)
        at = At(site, state.slot, placed, level)
        part = site.part if isinstance(site, ModuleSite) else None
        member = WeightMember if delta.face == "weight" else Member
        members.append(member(delta, at, part))
        if needs_overlay(members[-1]):
            check_weight_form(delta, site, placed, entries[:i])
    return members


def needs_level(delta: Delta) -> bool:
    """Whether a delta asks for the weight below it."""
    return "weight" in delta.reads


def check_weight_form(delta: Delta, site: Site, placed: Placed, below: Sequence[Entry]) -> None:
    """Raise unless every member below `delta` has a weight form to build its level from."""
    for other, other_site, under in below:
        if other_site.name != site.name and not _apart(other_site, site):
            raise AttachError(
                f"{placed.path!r} needs the weight below it, which {other.path!r} changes as part of another",
                saw=f"{site.name} and {other_site.name} overlap in one fused projection",
                do="give both the same targets",
            )
        if other_site.name == site.name and not under.folds:
            raise AttachError(
                f"{placed.path!r} needs the weight below it, and {other.path!r} has none there",
                saw=f"{type(delta).__name__} above {type(under).__name__} at {site.name}: {under.why_not()}",
                do=f"stack {other.part_name!r} after {placed.part_name!r}, or give them different targets",
            )


def _attention_program(
    state: State, site: AttentionSite, plans: Sequence[StackPlan], prompts: bool
) -> Columns | RoutedColumns | None:
    programs: list[Columns | None] = []
    for plan in plans:
        entries = plan.at(site.module, AttentionSite)
        members: list[Any] = []
        if plan.sequence and prompts:
            placed, sequence, _ = plan.sequence[0]
            columns = PromptColumns(state.slot, plan.stack, site.name)
            members.append((columns, At(sequence, state.slot, placed, None)))
        members += [(delta, At(site, state.slot, placed, None)) for placed, site, delta in entries]
        programs.append(Columns(members) if members else None)
    if len(programs) == 1 or not any(programs):
        return programs[0]
    return RoutedColumns(programs, state.slot, site)


def taps_of(plans: Sequence[StackPlan]) -> dict[int, list[tuple[str, int, str]]]:
    """Return what each module must keep for a sublayer's or attention's deltas: (key, position, name)."""
    taps: dict[int, dict[str, tuple[str, int, str]]] = {}

    def keep(module: nn.Module, key: str, position: int, name: str) -> None:
        taps.setdefault(id(module), {})[key] = (key, position, name)

    for plan in plans:
        for entries in plan.entries.values():
            for _, site, delta in entries:
                if isinstance(site, SublayerSite):
                    if site.x.module is not site.module:
                        keep(site.x.module, f"{site.name}/x", site.x.position, site.x.name)
                    if "residual" in delta.reads and site.residual is not None:
                        keep(site.residual.module, f"{site.name}/residual", site.residual.position,
                             site.residual.name)  # fmt: skip
                elif isinstance(site, AttentionSite) and "x" in delta.reads:
                    keep(site.module, f"{site.name}/x", 0, "hidden_states")
    return {module: list(keys.values()) for module, keys in taps.items()}


def _prepares(
    state: State, plans: Sequence[StackPlan], prompts: bool
) -> list[tuple[Hashable, Callable[[Call], Any]]]:
    found: dict[Hashable, Callable[[Call], Any]] = {}
    for plan in plans:
        found.update({p.id: p.prepare for p in plan.placed if p.method.prepares})
    for plan in plans:
        if plan.sequence and prompts:
            found[plan.stack] = partial(_prompt, state, plan.sequence, plan.stack)
    return list(found.items())


def _prompt(state: State, entries: Sequence[Entry], stack: tuple[int, ...], call: Call) -> Any:
    alone = Call(state.table_for((stack,), prompts=False), state.slot, tasks=call.tasks)
    members = [(delta, At(site, state.slot, placed, None)) for placed, site, delta in entries]
    site = entries[0][1]
    assert isinstance(site, SequenceSite)
    return run_prompt(call, alone, site, members)


def _apart(a: Site, b: Site) -> bool:
    """Whether two sites on one module are different slices of it (they never overlap partly)."""
    return bool(getattr(a, "part", None) and getattr(b, "part", None))
