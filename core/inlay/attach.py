"""Attach and detach: apply a plan to the model, all or nothing, and take it off without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from inlay import attention, masks
from inlay.attention import AttentionPort
from inlay.blocks import BlockPort
from inlay.compile import StackPlan, taps_of
from inlay.errors import AttachError, ConfigError, MergedError, shown
from inlay.hosts import (
    CHILD,
    Deltas,
    Host,
    Port,
    check_can_host,
    check_can_leave,
    enter,
    host_class,
    is_running,
    leave,
    unbind_checkpointing,
)
from inlay.method import Method
from inlay.plan import Plan, PlannedPart, build, check_module, resolve_stack, tied_names, with_trained
from inlay.sites import AttentionSite, BlockSite, ModuleSite, SequenceSite
from inlay.stack import Part, Placed, Stack, State, check_name, need_state, state_of


def attach(
    model: nn.Module,
    what: Method | Part | Stack | str,
    name: str = "default",
    *,
    train: Sequence[str] = (),
    activate: bool = True,
    trainable: bool = True,
    data: Iterable[Any] | None = None,
    seed: int | None = None,
) -> Plan:
    """Attach a stack to `model`, in place, under `name`; return the plan that was carried out.

    The adapter goes on top of the active stack (`activate=False`: not) and learns
    (`trainable=False`: not); the base stops learning. `train` names targets (such as "head") whose
    own tensors learn too. `data` are batches for methods that calibrate. `seed` makes its weights;
    by default one is drawn from torch's generator.

    Raises `ConfigError`, `TargetError` or `AttachError` with the model untouched.
    """
    state = start(model, name, "attach")
    resolved = resolve_stack(model, with_trained(Stack.of(what), train))
    seed = int(torch.randint(2**31, (), device="cpu").item()) if seed is None else seed
    if not isinstance(seed, int) or not 0 <= seed < 2**53:
        raise ConfigError("this cannot be a seed", saw=f"seed={shown(seed)}", do="give an integer from 0 on")
    built = build(state, name, resolved, seed=seed, data=data)
    place(state, built, activate=activate, trainable=trainable)
    return report(state, built)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take the adapter `name` (or every adapter) off; the model is what it was, bit for bit.

    Merged parts that can be undone are unmerged first.
    """
    state = need_state(model)
    going = list(state.placed.values()) if name is None else state.find(name)
    _refuse_if_used(state, going)
    check_can_leave(state.hosts)
    if state.merged_tensors:
        from inlay.merge import unmerge

        unmerge(model)
    remove(state, going)


def _refuse_if_used(state: State, going: Sequence[Placed]) -> None:
    adapters = [p.adapter for p in going]
    for placed in state.placed.values():
        used = [p.path for p in going for other in placed.adapter.fused if p.adapter is other]
        if used and placed.adapter not in adapters:
            raise AttachError(
                f"{placed.path!r} computes with an adapter that would go",
                saw=f"it uses {', '.join(map(repr, used))}",
                do=f"detach {placed.adapter_name!r} first",
            )


def set_trainable(model: nn.Module, *names: str) -> None:
    """Let exactly the named adapters or parts learn (none named: nothing does)."""
    state = need_state(model)
    if any(p.merged for p in state.placed.values()):
        raise refused_while_merged(state, "set_trainable")
    chosen = state.find_all(names)
    for placed in state.placed.values():
        placed.trainable = placed in chosen
    masks.apply(state)


def start(model: nn.Module, name: str, verb: str) -> State:
    """Return the model's state for a new adapter called `name`, or raise."""
    check_module(model, verb)
    state = state_of(model)
    if state is None:
        if any(isinstance(m, Host) for m in model.modules()):
            raise AttachError(
                "this module is part of a model, or holds one, that has adapters of its own",
                saw=f"a {type(model).__name__} with inlay hosts inside",
                do=f"{verb} to the same object as before, or detach there first",
            )
        state = State(model)
    check_name(name, "adapter")
    sharded = next((n for n, p in model.named_parameters() if hasattr(p, "full_tensor")), None)
    if sharded is not None:
        raise AttachError(
            "the model is sharded already, so the adapter's own tensors would be left out",
            saw=f"{sharded} is one process's part of a tensor",
            do=f"{verb} first, then shard (fully_shard)",
        )
    if any(p.merged for p in state.placed.values()):
        raise refused_while_merged(state, verb)
    if name in state.names:
        raise ConfigError(
            f"an adapter called {name!r} is already attached",
            saw=f"attached: {', '.join(map(repr, state.names))}",
            do=f'choose another name, or inlay.detach(model, "{name}") first',
        )
    return state


def refused_while_merged(state: State, verb: str) -> MergedError:
    merged = [p.path for p in state.placed.values() if p.merged]
    return MergedError(
        f"{verb} is undefined while adapters are merged",
        saw=f"merged: {', '.join(map(repr, merged))}",
        do="inlay.unmerge(model) first",
    )


def place(state: State, built: Sequence[Placed], *, activate: bool = True, trainable: bool = True) -> None:
    """Put built parts on the model. On any failure everything is undone in reverse order."""
    before = (dict(state.placed), state.active, state.next_id)
    undo = ExitStack()
    needed = _needed(state, built)
    try:
        if not state.hosts:
            _open(state, undo)
        _enter_all(state, needed, undo)
        for placed in built:
            placed.trainable = trainable
            _register(state, placed, undo)
            state.placed[placed.id] = placed
        state.next_id = max(p.id for p in built) + 1
        masks.apply(state)
        state.activate(state.active + tuple(p.id for p in built) if activate else None)
        _check_running(state)
    except BaseException:
        state.placed, state.active, state.next_id = before
        undo.close()
        if state.placed:
            state.activate()
            masks.apply(state)
        raise


def remove(state: State, going: Sequence[Placed]) -> None:
    """Take parts off the model; with the last one, everything else of ours."""
    ids = {p.id for p in going}
    for placed in going:
        del state.placed[placed.id]
        _unregister(state, placed)
    state.active = tuple(i for i in state.active if i not in ids)
    if not state.placed:
        _close(state)
        return
    _prune(state)
    masks.apply(state)
    state.activate()


def report(state: State, built: Sequence[Placed]) -> Plan:
    own = {id(p) for _, _, p in state.own_parameters()}
    base = sum(p.numel() for p in state.model.parameters() if id(p) not in own)
    parts = []
    for placed in built:
        tensors = [p for _, p in placed.adapter.named_parameters()]
        size = sum(t.numel() * t.element_size() for t in tensors)
        part = Part(placed.part_name, placed.method)
        parts.append(PlannedPart(part, placed.adapter.sites, sum(t.numel() for t in tensors), size))
    return Plan(parts, base, tied_names(state.model, [s for p in parts for s in p.sites]))


# -- what goes where -----------------------------------------------------------------------------


def _needed(state: State, built: Sequence[Placed]) -> list[nn.Module]:
    """Return the modules that must become hosts, their classes already made."""
    modules: dict[int, nn.Module] = {}
    names = {id(m): n for n, m in state.model.named_modules()}
    by_id = {id(m): m for m in state.model.modules()}
    trial = State(state.model, state.slot, {p.id: p for p in built})
    plan = StackPlan(trial, tuple(p.id for p in built))
    for placed in built:
        for site, delta in placed.adapter.placed:
            if isinstance(site, AttentionSite):
                attention.check_can_enter(site)
            elif isinstance(site, SequenceSite):
                for inner in site.attentions:
                    attention.check_can_enter(inner)
            elif not isinstance(site, BlockSite):
                modules[id(site.module)] = site.module
            del delta
    modules.update({key: by_id[key] for key in taps_of([plan])})
    new = [m for m in modules.values() if not isinstance(m, Host)]
    for module in new:
        check_can_host(module, names.get(id(module), "?"))
        _make_class(module, names.get(id(module), "?"), scope=module is state.model)
    return new


def _make_class(module: nn.Module, name: str, *, scope: bool) -> None:
    try:
        host_class(type(module), scope)  # type: ignore[arg-type]
    except Exception as error:
        raise AttachError(
            "a module's class cannot be subclassed, so nothing can be placed on it",
            saw=f"{name} is a {type(module).__name__}: {error}",
            do="choose other targets",
        ) from error


def _open(state: State, undo: ExitStack) -> None:
    """Make the root, and every transformers model inside it, scopes."""
    scopes = [
        (name, module)
        for name, module in state.model.named_modules()
        if module is state.model or (hasattr(module, "save_pretrained") and hasattr(module, "config"))
    ]
    for name, module in scopes:
        check_can_host(module, name)
        _make_class(module, name, scope=True)
    state.requires_grad = masks.remember(state.model)
    state.checkpointed = [m for m in state.model.modules() if hasattr(m, "gradient_checkpointing")]
    undo.callback(masks.restore, state.model, state.requires_grad)
    undo.callback(unbind_checkpointing, state.checkpointed)
    for name, module in scopes:
        _enter(state, name, module, undo, scope=True)
        module.__dict__["_inlay_state"] = state
        undo.callback(module.__dict__.pop, "_inlay_state", None)


def _enter_all(state: State, modules: Sequence[nn.Module], undo: ExitStack) -> None:
    names = {id(m): n for n, m in state.model.named_modules()}
    for module in modules:
        if not isinstance(module, Host):
            _enter(state, names[id(module)], module, undo, scope=False)


def _enter(state: State, name: str, module: nn.Module, undo: ExitStack, *, scope: bool) -> None:
    enter(module, Port(state.slot, len(state.hosts)), scope=scope)
    state.hosts.append((name, module))
    undo.callback(state.hosts.remove, (name, module))
    undo.callback(leave, module)


def _register(state: State, placed: Placed, undo: ExitStack) -> None:
    """Make the part's modules children of the modules they act on, and open its attention and block ports."""
    for site, delta in placed.adapter.placed:
        _ = site.out_features  # noted now, to see later whether the layer was resized
        owner = state.model if isinstance(site, SequenceSite) else site.module
        _adopt(state, owner, str(placed.id), delta, undo)
        delta.train(owner.training)
        for inner in site.attentions if isinstance(site, SequenceSite) else (site,):
            if isinstance(inner, AttentionSite) and "_inlay_attention" not in inner.module.__dict__:
                port = AttentionPort(state.slot, len(state.attention_ports), inner)
                attention.enter(port)
                state.attention_ports.append(port)
                undo.callback(state.attention_ports.remove, port)
                undo.callback(attention.leave, port)
            elif isinstance(inner, BlockSite) and not any(
                p.site.module is inner.module for p in state.block_ports
            ):
                block = BlockPort(state.slot, len(state.block_ports), inner)
                block.enter()
                state.block_ports.append(block)
                undo.callback(state.block_ports.remove, block)
                undo.callback(block.leave)
    if placed.adapter.shared:
        _adopt(state, state.model, f"{placed.id}_shared", placed.adapter.shared, undo)
        placed.adapter.shared.train(state.model.training)


def _adopt(state: State, owner: nn.Module, key: str, module: nn.Module, undo: ExitStack) -> None:
    if CHILD not in owner._modules:
        if hasattr(owner, CHILD):
            check_can_host(owner, type(owner).__name__)
        owner._modules[CHILD] = Deltas().train(owner.training)
        undo.callback(owner._modules.pop, CHILD, None)
    container: Any = owner._modules[CHILD]
    if key not in container:
        container[key] = nn.ModuleList().train(owner.training)
        undo.callback(container._modules.pop, key, None)
    container[key].append(module)


def _unregister(state: State, placed: Placed) -> None:
    owners = [state.model, *(site.module for site, _ in placed.adapter.placed)]
    for owner in owners:
        container: Any = owner._modules.get(CHILD)
        if container is None:
            continue
        for key in (str(placed.id), f"{placed.id}_shared"):
            if key in container:
                del container[key]
        if not len(container):
            del owner._modules[CHILD]


def _prune(state: State) -> None:
    """Let go of hosts and ports that no remaining part uses, and renumber the rest."""
    plan = StackPlan(state, tuple(state.placed))
    used = set(plan.entries) | set(taps_of([plan]))
    kept = [(n, m) for n, m in state.hosts if id(m) in used or "_inlay_state" in m.__dict__]
    for name, module in state.hosts:
        if (name, module) not in kept:
            leave(module)
    state.hosts = kept
    for index, (_, module) in enumerate(kept):
        module.__dict__["_inlay_port"].index = index
    prompted = {id(s.module) for _, site, _ in plan.sequence for s in getattr(site, "attentions", ())}
    for port in [p for p in state.attention_ports if id(p.site.module) not in used | prompted]:
        attention.leave(port)
        state.attention_ports.remove(port)
    for block in [b for b in state.block_ports if id(b.site.module) not in used]:
        block.leave()
        state.block_ports.remove(block)
    ports: list[AttentionPort | BlockPort] = [*state.attention_ports]
    for numbered in (ports, state.block_ports):
        for index, item in enumerate(numbered):
            item.index = index


def _close(state: State) -> None:
    for port in state.attention_ports:
        attention.leave(port)
    for block in state.block_ports:
        block.leave()
    for _, module in state.hosts:
        leave(module)
        module.__dict__.pop("_inlay_state", None)
    unbind_checkpointing(state.checkpointed)
    masks.restore(state.model, state.requires_grad)
    state.hosts, state.attention_ports, state.block_ports = [], [], []


def _check_running(state: State) -> None:
    """Raise unless every host is still in the model and its forward is the one that runs."""
    if gone := sites_still_there(state):
        raise AttachError(
            "an adapter attached before has lost its place in the model",
            saw=f"{gone[0]} was replaced or resized since (resize_token_embeddings does this)",
            do="detach, then attach again: change the model before its adapters",
        )
    if patched := bypassed(state):
        raise AttachError(
            "an adapter's site would be bypassed",
            saw=f"{patched[0]} stands before the class",
            do="remove that patch (del module.forward) or choose other targets",
        )


def bypassed(state: State) -> list[str]:
    """Return what was put, on the instance, before the forward of a module that runs deltas."""
    ports = [(port.site.name, port.site.module) for port in state.attention_ports]
    found = [(name, module) for name, module in [*state.hosts, *ports] if not is_running(module)]
    return [f"{name}: {module.__dict__['forward']!r:.120}" for name, module in found]


def sites_still_there(state: State) -> list[str]:
    """Return the names of sites that are no longer the objects attached to, or of another size now."""
    now = dict(state.model.named_modules(remove_duplicate=False))
    places = [*state.hosts, *((p.site.name, p.site.module) for p in state.attention_ports)]
    places += [(p.site.name, p.site.module) for p in state.block_ports]
    gone = [name for name, module in places if now.get(name) is not module]
    sites = {site.name: site for p in reversed(state.placed.values()) for site, _ in p.adapter.placed}
    return gone + [name for name, s in sites.items() if isinstance(s, ModuleSite) and s.resized]
