"""Plan, then act: resolving a stack to sites and building its adapters without touching the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from inlay.adapter import Adapter
from inlay.anatomy import Anatomy
from inlay.errors import AttachError, ConfigError, shown
from inlay.hosts import base_size
from inlay.manifest import DTYPES
from inlay.method import Method
from inlay.registry import registry
from inlay.routing import use
from inlay.sites import Site
from inlay.sites.site import plain_dtype
from inlay.stack import Part, Placed, Stack, State, state_of
from inlay.targets import by_name, resolve


@dataclass
class PlannedPart:
    """One part of a stack with the sites it would act on and what it would cost."""

    part: Part
    sites: tuple[Site, ...]
    parameters: int = 0
    bytes: int = 0

    @property
    def kinds(self) -> dict[str, int]:
        return dict(Counter(site.role or site.kind for site in self.sites))


@dataclass
class Plan:
    """What `attach` would do: sites hit by kind, counts and bytes, storages that are tied."""

    parts: list[PlannedPart]
    model_parameters: int
    tied: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(p.parameters for p in self.parts)

    def __str__(self) -> str:
        lines = []
        for p in self.parts:
            kinds = ", ".join(f"{count} {kind}" for kind, count in p.kinds.items())
            share = 100 * p.parameters / max(1, self.model_parameters)
            lines.append(
                f"{p.part.name}: {p.part.method.id} on {len(p.sites)} sites ({kinds}); "
                f"{p.parameters:,} parameters ({share:.3g} % of the base), {p.bytes:,} bytes"
            )
        lines += [f"tied storage: {name}" for name in self.tied]
        return "\n".join(lines)


def plan(
    model: nn.Module,
    what: Method | Part | Stack | str,
    *,
    train: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Plan:
    """Say what `attach` would do, without doing it. Works on the meta device too."""
    check_module(model, "plan")
    check_dtype(dtype)
    stack = with_trained(Stack.of(what), train)
    resolved = resolve_stack(model, stack)
    built = [
        (
            part,
            build_adapter(model, part.method, sites, seed=0, meta=True, find=_finder(model), dtype=dtype),
        )
        for part, sites in resolved
    ]
    return planned(model, built)


def planned(model: nn.Module, built: Iterable[tuple[Part, Adapter]]) -> Plan:
    """Return the plan that these adapters carry out."""
    parts = []
    for part, adapter in built:
        tensors = [p for _, p in adapter.named_parameters()]
        size = sum(t.numel() * t.element_size() for t in tensors)
        parts.append(PlannedPart(part, adapter.sites, sum(t.numel() for t in tensors), size))
    return Plan(parts, base_size(model), tied_names(model, [s for p in parts for s in p.sites]))


def check_module(model: object, verb: str) -> None:
    """Raise unless `model` is a torch module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{verb} needs a torch module", saw=f"a {type(model).__name__}", do="pass the model itself"
        )
    if type(model).__module__.startswith("torch._dynamo."):
        raise ConfigError(
            f"{verb} needs the model that torch.compile was given, not what it gave back",
            saw=f"a {type(model).__name__} around a {type(getattr(model, '_orig_mod', model)).__name__}",
            do=f"{verb} to the model itself; what was compiled of it, before or after, runs its adapters",
        )


def check_dtype(dtype: object) -> None:
    """Raise unless an adapter's tensors can have this dtype (None: the base's)."""
    if dtype is not None and dtype not in DTYPES.values():
        raise ConfigError(
            "an adapter cannot be kept in this dtype",
            saw=f"dtype={shown(dtype)}",
            do=f"give one of {', '.join(f'torch.{name}' for name in DTYPES)}, or None: the base's own",
        )


def with_trained(stack: Stack, targets: Sequence[str]) -> Stack:
    """Return the stack with an innermost part that trains the base's own tensors at `targets`.

    Innermost, so that what else acts there adds to the trained values.
    """
    if not targets:
        return stack
    from inlay.authoring.trained import Trained

    if not isinstance(targets, (list, tuple)):
        raise ConfigError("train is a list of targets", saw=shown(targets), do='train=("head",)')
    return Trained(targets=tuple(targets)) + stack


def resolve_stack(model: nn.Module, stack: Stack) -> list[tuple[Part, tuple[Site, ...]]]:
    """Return each part with its sites; raise if an entry of its targets matches nothing."""
    anatomy = Anatomy(model)
    return [(part, _in_dtype(model, resolve(anatomy, part.method))) for part in stack.parts]


def resolve_names(
    model: nn.Module, parts: Iterable[tuple[Part, Sequence[str]]]
) -> list[tuple[Part, tuple[Site, ...]]]:
    """Return each part with the sites a checkpoint lists for it."""
    anatomy = Anatomy(model)
    return [(part, _in_dtype(model, by_name(anatomy, part.method, names))) for part, names in parts]


def _in_dtype(model: nn.Module, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Return the sites, each in quantised layers alone told what dtype the rest of the model has."""
    for site in sites:
        if site.around is None and plain_dtype(site.like) is None:
            site.around = plain_dtype(model)
    return sites


def build_adapter(model: nn.Module, method: Method, sites: tuple[Site, ...], **options: Any) -> Adapter:
    """Return a method's adapter, its deltas made but not yet on the model; options as Adapter's."""
    adapter = Adapter(sites, model=model, **options)
    registry.call("inject", method, sites=sites, adapter=adapter)
    if not adapter.placed:
        raise AttachError(
            f"{method.id!r} placed nothing", saw=f"{len(sites)} sites offered", do="choose other targets"
        )
    return adapter


def build(
    state: State,
    name: str,
    resolved: Sequence[tuple[Part, tuple[Site, ...]]],
    *,
    seed: int,
    data: Iterable[Any] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Placed]:
    """Return the placed parts of a new adapter, numbered, calibrated where their methods ask for it."""
    built = []
    batches = _repeatable(data)
    for number, (part, sites) in enumerate(resolved):
        calibration = _calibrate(state, part, sites, batches)
        adapter = build_adapter(
            state.model,
            part.method,
            sites,
            seed=seed + number,
            calibration=calibration,
            find=state.adapter_of,
            path=f"{name}/{part.name}",
            dtype=dtype,
        )
        built.append(Placed(state.next_id + number, name, part.name, part.method, adapter))
    return built


def _calibrate(state: State, part: Part, sites: tuple[Site, ...], data: Iterable[Any] | None) -> Any:
    """Return what the part's method measures of the bare model in evaluation mode; None if it does not."""
    if not part.method.calibrates:
        return None
    if data is None:
        raise ConfigError(
            f"{part.method.id!r} must see data before it is placed",
            saw="data=None",
            do="pass inlay.attach(..., data=batches)",
        )
    bare = use(state.model) if state.placed else nullcontext()
    with torch.random.fork_rng(devices=[]), evaluating(state.model), bare:
        return registry.call("calibrate", part.method, model=state.model, sites=sites, batches=data)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode for a while; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Repeatable:
    """What an iterator gives, to be gone through several times: by each part, or again by one."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source, self.seen = source, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        yield from self.seen
        for batch in self.source:
            self.seen.append(batch)
            yield batch


def _repeatable(data: Any) -> Iterable[Any] | None:
    """Return the user's batches as something to go through more than once, or raise."""
    if data is not None and not isinstance(data, Iterable):
        raise ConfigError(
            "data is nothing that gives batches",
            saw=f"a {type(data).__name__}",
            do="pass a list of batches, or a DataLoader",
        )
    return _Repeatable(data) if isinstance(data, Iterator) else data


def tied_names(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Return the sites' parameters that another module of the model also holds."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    wanted = {id(p) for s in sites for p in s.module.parameters(recurse=False)}
    return [" = ".join(names) for key, names in owners.items() if len(names) > 1 and key in wanted]


def _finder(model: nn.Module) -> Any:
    state = state_of(model)
    return None if state is None else state.adapter_of
