"""Compiling a choice of stacks into one program per host: done at activation, never in a forward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.attention import AttentionPort, Columns, PromptColumns, RoutedColumns
from inlay.context import At, Call
from inlay.delta import Delta
from inlay.errors import AttachError
from inlay.experts import Experts, RoutedExperts
from inlay.hosts import HostPort, own_class
from inlay.ports import BlockPort, Port
from inlay.programs import (
    Member,
    Overlay,
    Routed,
    Table,
    Tapped,
    WeightMember,
    by_weight,
    needs_overlay,
    program_of,
)
from inlay.rows import Gate, Inner, Reader, Shifted, Turned, Virtual, run_rows
from inlay.sites import AttentionSite, BlockSite, ModuleSite, SequenceSite, Site, SublayerSite
from inlay.weights import Level

if TYPE_CHECKING:
    from inlay.stack import Placed, State

Entry = tuple["Placed", Site, Delta]
Taps = dict[nn.Module, list[tuple[str, int, str]]]
PORTS: dict[type[Site], type[Port]] = {AttentionSite: AttentionPort, BlockSite: BlockPort}


def compile_table(state: State, stacks: Sequence[tuple[int, ...]], *, prompts: bool = True) -> Table:
    """Return the programs of `stacks`: one for all rows, or several among which rows choose."""
    plans = [StackPlan(state, stack) for stack in stacks]
    taps = taps_of(plans)
    table = Table([_program(state, port, plans, taps, prompts) for port in state.ports])
    table.prepares = tuple(_prepares(state, plans, prompts))
    table.reads_call = any(p.wants_call for p in plans)
    table.scoped = bool(table.prepares or taps or len(plans) > 1 or table.reads_call)
    return table


class StackPlan:
    """The deltas of one stack, by the module they act on, in stack order."""

    def __init__(self, state: State, stack: tuple[int, ...]) -> None:
        self.stack = stack
        self.placed = [state.placed[i] for i in stack if not state.placed[i].merged]
        self.entries: dict[nn.Module, list[Entry]] = {}  # see `inside_out`
        self.sequences: dict[str, list[Entry]] = {}
        for placed in self.placed:
            for site, delta in placed.adapter.placed:
                if isinstance(site, SequenceSite):
                    self.sequences.setdefault(site.name, []).append((placed, site, delta))
                else:
                    self.entries.setdefault(site.module, []).append((placed, site, delta))
        self.entries = {module: inside_out(entries) for module, entries in self.entries.items()}
        self.wants_call = any(p.method.reads_call for p in self.placed)

    def sites(self) -> list[SequenceSite]:
        """Return the sequences that virtual tokens enter."""
        return [
            s for entries in self.sequences.values() for _, s, _ in entries[:1] if isinstance(s, SequenceSite)
        ]


def inside_out(entries: Sequence[Entry]) -> list[Entry]:
    """Return one module's entries as they lie around it: a sublayer's are outside of the layer's own."""
    return sorted(entries, key=lambda entry: isinstance(entry[1], SublayerSite))


def places_of(plan: StackPlan) -> dict[tuple[type[Port], nn.Module], Site | None]:
    """Return where a stack needs ports: (kind of port, module), with the site it is for."""
    found: dict[tuple[type[Port], nn.Module], Site | None] = {}
    for module, entries in plan.entries.items():
        for _, site, _ in entries:
            found[PORTS.get(type(site), HostPort), module] = site
    for sequence in plan.sites():
        found.update({(AttentionPort, inner.module): inner for inner in sequence.attentions})
        hosts = (sequence.positions, sequence.reader, sequence.module if sequence.blocks else None)
        found.update({(HostPort, module): None for module in hosts if module is not None})
        found.update({(BlockPort, block): found.get((BlockPort, block)) for block in sequence.blocks})
    return {**dict.fromkeys((HostPort, module) for module in taps_of([plan])), **found}


def _program(state: State, port: Port, plans: Sequence[StackPlan], taps: Taps, prompts: bool) -> Any:
    """Return what runs at one port: the plans' own program, or one that splits the rows among theirs."""
    if isinstance(port, AttentionPort):
        return _attention_program(state, port.site, plans, prompts)
    kinds = (BlockSite,) if isinstance(port, BlockPort) else (ModuleSite, SublayerSite)
    here = [[e for e in plan.entries.get(port.module, []) if isinstance(e[1], kinds)] for plan in plans]
    site = next((e[1] for entries in here for e in entries), None)
    of_experts = isinstance(site, ModuleSite) and site.expert is not None
    make, routed = (Experts.of, RoutedExperts) if of_experts else (program_of, Routed)
    programs = [make(members_of(state, entries), state.slot) for entries in here]
    program: Any = programs[0]
    if len(programs) > 1 and site is not None:
        program = routed(programs, state.slot, site)
    keep = taps.get(port.module) if isinstance(port, HostPort) else None
    program = Tapped(keep, state.slot, program) if keep else program
    return _with_virtual(state, port, plans, program) if prompts else program


def _virtual(state: State, plans: Sequence[StackPlan], site: SequenceSite) -> Virtual:
    keys = [(plan.stack, site.name) if site.name in plan.sequences else None for plan in plans]
    return Virtual(state.slot, site, keys)


def _with_virtual(state: State, port: Port, plans: Sequence[StackPlan], program: Any) -> Any:
    """Return what runs at a module that virtual tokens pass, or that must know of them."""
    sites = {site.name: site for plan in plans for site in plan.sites()}
    for site in sites.values():
        virtual, module = _virtual(state, plans, site), port.module
        if isinstance(port, BlockPort):
            program = Gate(virtual, program, module) if module in site.blocks else program
        elif module is site.positions and site.rotary:
            program = Turned(virtual)
        elif module is site.positions:
            program = Shifted(virtual, _tables(program, port) or [None] * len(plans))
        elif module is site.module and site.blocks:
            program = Inner(virtual)
        elif module is site.reader:
            program = Reader(virtual)
    return program


def _tables(program: Any, port: Port) -> list[Overlay | None]:
    """Return what each stack makes of a table of positions, nothing if none does.

    Raise if it is more than other values in it.
    """
    tables: list[Any] = (
        list(program.programs) if isinstance(program, Routed) else [program] if program else []
    )
    if any(t is not None and (type(t) is not Overlay or t.members) for t in tables):
        raise AttachError(
            "virtual tokens move the table of positions, and another part changes what it gives",
            saw=f"a delta on the output of {port.name}",
            do="choose other targets for that part; what changes the table's own values may stay",
        )
    return tables


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
            check_readable(level, delta, placed)
        at = At(site, state.slot, placed, level)
        part = site.part if isinstance(site, ModuleSite) else None
        member = WeightMember if delta.face == "weight" else Member
        members.append(member(delta, at, part))
        if needs_overlay(members[-1]):
            check_weight_form(delta, site, placed, entries[:i])
        if by_weight(site):
            check_acts_by_weight(delta, site, placed)
    return members


def needs_level(delta: Delta) -> bool:
    """Whether a delta asks for the weight below it."""
    return "weight" in delta.reads


def check_readable(level: Level, delta: Delta, placed: Placed) -> None:
    """Raise if `delta` needs the weight of a layer that packs it in a way no backend can read."""
    if level.backend is None or level.backend.readable or not (needs_level(delta) or delta.replaces):
        return
    kind = own_class(level.site.module)
    raise AttachError(
        f"{placed.path!r} needs the weight of a layer that no backend can read",
        saw=f"{type(delta).__name__} at {level.site.name}, a {kind.__module__}.{kind.__name__}",
        do="choose other targets, or a method that only changes what the layer gives or reads (lora, ia3)",
    )


def check_weight_form(delta: Delta, site: Site, placed: Placed, below: Sequence[Entry]) -> None:
    """Raise unless every member below `delta` has a weight form to build its level from."""
    for other, other_site, under in below:
        if other_site.name != site.name and not apart(other_site, site):
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


def check_acts_by_weight(delta: Delta, site: Site, placed: Placed) -> None:
    """Raise unless all that a delta does is in its weight form."""
    dropout = getattr(placed.method, "dropout", 0.0)
    if not delta.folds or dropout:
        raise AttachError(
            f"{placed.path!r} cannot act where only a layer's weights are read",
            saw=f"{site.name} of a {type(site.module).__name__}: "
            + (f"dropout={dropout} has no weight form" if delta.folds else delta.why_not()),
            do="leave dropout out, or choose other targets",
        )


def _attention_program(
    state: State, site: AttentionSite, plans: Sequence[StackPlan], prompts: bool
) -> Columns | RoutedColumns | None:
    programs: list[Columns | None] = []
    sites = {s.name: s for plan in plans if prompts for s in plan.sites()
             if any(a.module is site.module for a in s.attentions)}  # fmt: skip
    own = next(iter(sites.values()), None)
    for plan in plans:
        entries = [e for e in plan.entries.get(site.module, []) if isinstance(e[1], AttentionSite)]
        members: list[Any] = []
        if own is not None and not own.blocks and own.name in plan.sequences:
            columns = PromptColumns(state.slot, (plan.stack, own.name), site.name)
            members.append((columns, At(own, state.slot, plan.sequences[own.name][0][0], None)))
        members += [(delta, At(site, state.slot, placed, None)) for placed, site, delta in entries]
        programs.append(Columns(members) if members else None)
    virtual = _virtual(state, plans, own) if own is not None and own.blocks else None
    if len(programs) > 1 and (virtual or any(programs)):
        return RoutedColumns(programs, state.slot, site, virtual)
    return Columns(() if programs[0] is None else programs[0].members, virtual) if virtual else programs[0]


def taps_of(plans: Sequence[StackPlan]) -> Taps:
    """Return what each module must keep for a sublayer's or attention's deltas: (key, position, name)."""
    taps: dict[nn.Module, dict[str, tuple[str, int, str]]] = {}

    def keep(module: nn.Module, key: str, position: int, name: str) -> None:
        taps.setdefault(module, {})[key] = (key, position, name)

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
    for plan in plans if prompts else ():
        for name, entries in plan.sequences.items():
            table = state.table_for((plan.stack,), prompts=False)  # now: a traced call compiles nothing
            found[plan.stack, name] = partial(_rows, state, entries, table)
    return list(found.items())


def _rows(state: State, entries: Sequence[Entry], table: Table, call: Call) -> Any:
    alone = Call(table, state.slot, tasks=call.tasks)
    members = [(delta, At(site, state.slot, placed, None)) for placed, site, delta in entries]
    site = entries[0][1]
    assert isinstance(site, SequenceSite)
    return run_rows(call, alone, site, members)


def apart(a: Site, b: Site) -> bool:
    """Whether two sites on one module are different tensors or slices of it (these never overlap partly)."""
    if not (isinstance(a, ModuleSite) and isinstance(b, ModuleSite)):
        return False
    return a.weight_name != b.weight_name or a.expert != b.expert or bool(a.part and b.part)
