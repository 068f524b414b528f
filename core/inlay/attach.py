"""Attach and detach: apply a plan to the model, all or nothing, and take it off without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from inlay import masks
from inlay.attention import AttentionPort
from inlay.compile import StackPlan, places_of
from inlay.errors import AttachError, ConfigError, MergedError, shown
from inlay.hosts import (
    CHILD,
    Deltas,
    Host,
    HostPort,
    check_can_host,
    check_can_leave,
    check_unwrapped,
    is_running,
    unbind_checkpointing,
)
from inlay.method import Method
from inlay.multihead import ShortcutPort, takes_shortcuts
from inlay.plan import Plan, build, check_dtype, check_module, planned, resolve_stack, with_trained
from inlay.ports import BlockPort, Port
from inlay.sites import AttentionSite, ModuleSite, SequenceSite
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
    dtype: torch.dtype | None = None,
) -> Plan:
    """Attach a stack to `model`, in place, under `name`; return the plan that was carried out.

    The adapter goes on top of the active stack (`activate=False`: not) and learns
    (`trainable=False`: not); the base stops learning. `train` names targets (such as "head") whose
    own tensors learn too. `data` are batches for methods that calibrate. `seed` makes its weights;
    by default one is drawn from torch's generator. `dtype` is what its tensors are kept in, by default
    the base's own; either way it computes in the dtype of the activations that it meets.

    Raises `ConfigError`, `TargetError` or `AttachError` with the model untouched.
    """
    state = start(model, name, "attach")
    resolved = resolve_stack(model, with_trained(Stack.of(what), train))
    seed = int(torch.randint(2**31, (), device="cpu").item()) if seed is None else seed
    if not isinstance(seed, int) or not 0 <= seed < 2**53:
        raise ConfigError("this cannot be a seed", saw=f"seed={shown(seed)}", do="give an integer from 0 on")
    check_dtype(dtype)
    built = build(state, name, resolved, seed=seed, data=data, dtype=dtype)
    _refuse_hidden(built)
    place(state, built, activate=activate, trainable=trainable)
    return planned(model, [(Part(p.part_name, p.method), p.adapter) for p in built])


def _refuse_hidden(built: Sequence[Placed]) -> None:
    """Refuse a stack one of whose parts puts values in the place of what another, below it, changes."""
    below: dict[str, Placed] = {}
    for placed in built:
        for site, delta in placed.adapter.placed:
            under = below.setdefault(site.name, placed)
            if under is not placed and delta.replaces:
                raise AttachError(
                    f"{under.path!r} would learn for nothing at {site.name}",
                    saw=f"{placed.path!r}, above it, puts its own values there",
                    do=f"stack {under.part_name!r} after {placed.part_name!r}, or leave one of them out",
                )


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take the adapter `name` (or every adapter) off; the model is what it was, bit for bit.

    Merged parts that can be undone are unmerged first.
    """
    state = need_state(model)
    going = list(state.placed.values()) if name is None else state.find(name)
    _refuse_if_used(state, going)
    check_can_leave(state.ports)
    if len(going) == len(state.placed):
        check_unwrapped(state.ports)
    if state.merge_undo:
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
    if state is None or state.model is not model:
        _refuse_wrapped(model, verb)
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


def _refuse_wrapped(model: nn.Module, verb: str) -> None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise AttachError(
            "the model is wrapped already, and its wrapper would not know the adapter's tensors",
            saw=f"a {type(model).__name__}, which noted at its start what to reduce or to copy",
            do=f"{verb} to the model inside (.module), then wrap that anew",
        )


def refused_while_merged(state: State, verb: str) -> MergedError:
    merged = [p.path for p in state.placed.values() if p.merged]
    return MergedError(
        f"{verb} is undefined while adapters are merged",
        saw=f"merged: {', '.join(map(repr, merged))}",
        do="inlay.unmerge(model) first",
    )


def place(state: State, built: Sequence[Placed], *, activate: bool = True, trainable: bool = True) -> None:
    """Put built parts on the model. On any failure everything is undone in reverse order."""
    before = (dict(state.placed), state.active, state.next_id, list(state.ports))
    undo = ExitStack()
    opening = [] if state.ports else _scopes(state)
    ports = opening + _new_ports(state, built, {p.module for p in opening if isinstance(p, HostPort)})
    try:
        if opening:
            _open(state, undo)
        for port in ports:
            port.enter()
            undo.callback(port.leave)
            state.ports.append(port)
        for placed in built:
            placed.trainable = trainable
            _adopt_all(state, placed, undo)
            state.placed[placed.id] = placed
        state.next_id = max(p.id for p in built) + 1
        _number(state)
        masks.apply(state)
        state.activate(state.active + tuple(p.id for p in built) if activate else None)
        _check_running(state)
    except BaseException:
        state.placed, state.active, state.next_id, state.ports = before
        undo.close()
        if state.placed:
            state.activate()
            masks.apply(state)
        raise


def remove(state: State, going: Sequence[Placed]) -> None:
    """Take parts off the model; with the last one, everything else of ours."""
    for placed in going:
        del state.placed[placed.id]
        _disown(state, placed)
    state.active = tuple(i for i in state.active if i in state.placed)
    used = places_of(StackPlan(state, tuple(state.placed)))
    stay = [p for p in state.ports if state.placed and (p.lasting or (type(p), p.module) in used)]
    for port in state.ports:
        if port not in stay:
            port.leave()
    state.ports = stay
    if state.placed:
        _number(state)
        masks.apply(state)
        state.activate()
        return
    unbind_checkpointing(state.checkpointed)
    masks.restore(state.model, state.requires_grad)


# -- what goes where -----------------------------------------------------------------------------


def _new_ports(state: State, built: Sequence[Placed], opened: set[nn.Module]) -> list[Port]:
    """Return the ports that built parts need and the model lacks, each checked; nothing is touched."""
    names = {module: name for name, module in state.model.named_modules()}
    there = {(type(port), port.module) for port in state.ports} | {(HostPort, module) for module in opened}
    trial = State(state.model, state.slot, {p.id: p for p in built})
    ports: list[Port] = []
    for (kind, module), site in places_of(StackPlan(trial, tuple(trial.placed))).items():
        if (kind, module) in there:
            continue
        if isinstance(site, AttentionSite) and kind is AttentionPort:
            port: Port = AttentionPort(state.slot, site)
        else:
            port = kind(state.slot, names.get(module, "?"), module)
        port.check()
        ports.append(port)
    return ports


def _scopes(state: State) -> list[Port]:
    """Return ports for the root and every transformers model inside it: scopes."""
    ports: list[Port] = []
    for name, module in state.model.named_modules():
        if module is state.model or (hasattr(module, "save_pretrained") and hasattr(module, "config")):
            ports.append(HostPort(state.slot, name, module, scope=state))
            ports[-1].check()
        if takes_shortcuts(module):
            ports.append(ShortcutPort(state.slot, name, module))
    return ports


def _open(state: State, undo: ExitStack) -> None:
    """Note what the model was like, to be given back with the last adapter."""
    state.requires_grad = masks.remember(state.model)
    state.checkpointed = [m for m in state.model.modules() if hasattr(m, "gradient_checkpointing")]
    undo.callback(masks.restore, state.model, state.requires_grad)
    undo.callback(unbind_checkpointing, state.checkpointed)


def _number(state: State) -> None:
    for index, port in enumerate(state.ports):
        port.index = index


def _adopt_all(state: State, placed: Placed, undo: ExitStack) -> None:
    """Make the part's modules children of the modules they act on."""
    for site, delta in placed.adapter.placed:
        _ = site.out_features  # noted now, to see later whether the layer was resized
        owner = state.model if isinstance(site, SequenceSite) else site.module
        _adopt(owner, str(placed.id), delta, undo)
    if placed.adapter.shared:
        _adopt(state.model, f"{placed.id}_shared", placed.adapter.shared, undo)


def _adopt(owner: nn.Module, key: str, module: nn.Module, undo: ExitStack) -> None:
    if CHILD not in owner._modules:
        if hasattr(owner, CHILD):
            check_can_host(owner, type(owner).__name__)
        owner._modules[CHILD] = Deltas().train(owner.training)
        undo.callback(owner._modules.pop, CHILD, None)
    container: Any = owner._modules[CHILD]
    if key not in container:
        container[key] = nn.ModuleList().train(owner.training)
        undo.callback(container._modules.pop, key, None)
    container[key].append(module.train(owner.training))


def _disown(state: State, placed: Placed) -> None:
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
    found = [p for p in state.ports if not isinstance(p, BlockPort) and not is_running(p.module)]
    return [f"{p.name}: {p.module.__dict__['forward']!r:.120}" for p in found]


def sites_still_there(state: State) -> list[str]:
    """Return the names of sites that are no longer the objects attached to, or of another size now."""
    now = dict(state.model.named_modules(remove_duplicate=False))
    gone = [port.name for port in state.ports if now.get(port.name) is not port.module]
    sites = {site.name: site for p in reversed(state.placed.values()) for site, _ in p.adapter.placed}
    return gone + [name for name, s in sites.items() if isinstance(s, ModuleSite) and s.resized]
