"""Composites: methods made of other methods, whose contributions they combine at each site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from inlay.delta import Delta
from inlay.hookspecs import hookimpl
from inlay.method import Method
from inlay.registry import registry
from inlay.targets import among

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inlay.adapter import Adapter, Init
    from inlay.context import Call
    from inlay.sites import Site
    from inlay.training import Group, Stage


@dataclass(frozen=True, kw_only=True)
class Composite(Method):
    """A method holding other methods: gates around them, mixtures of them, attention over them.

    Core resolves each child's targets (this method's own, if given, hold for children that name
    none) and places it; `combine` gets the children's deltas at a site and returns the one delta
    that stands there. It calls theirs by their face, and says which child is meant:
    `child(x, y, at.part(name))` gives Δy, an attention child's `child(at.part(name))` `KeyValues`.
    What the children measure, train, prepare, add to the loss and do between stages stays theirs.
    """

    def parts(self) -> Mapping[str, Method]:
        """Return the children by name."""
        raise NotImplementedError

    def combine(self, site: Site, children: Mapping[str, Sequence[Delta]], init: Init) -> Delta:
        """Return the delta of a site that one or more children act on."""
        raise NotImplementedError

    @property
    def accepts(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(part.accepts for part in self.parts().values()))

    @property
    def prepares(self) -> bool:  # type: ignore[override]
        return any(part.prepares for part in self.parts().values())

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return any(part.calibrates for part in self.parts().values())

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        return all(part.starts_as_identity for part in self.parts().values())

    @property
    def reads_call(self) -> bool:  # type: ignore[override]
        return any(part.reads_call for part in self.parts().values())

    @staticmethod
    @hookimpl
    def calibrate(
        method: Composite, model: nn.Module, sites: Sequence[Site], batches: Iterable[Any]
    ) -> dict[str, Tensor]:
        measured: dict[str, Tensor] = {}
        for name, part in method.inside().items():
            if part.calibrates:
                own = among(model, sites, part)
                found = registry.call("calibrate", part, model=model, sites=own, batches=batches)
                measured.update({f"{name}/{key}": tensor for key, tensor in found.items()})
        return measured

    @staticmethod
    @hookimpl
    def inject(method: Composite, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        children = {name: adapter.child(name, part) for name, part in method.inside().items()}
        for site in sites:
            here = {name: child.at(site) for name, child in children.items() if child.at(site)}
            adapter.place(site, method.combine(site, here, adapter.init(site)))
        return len(sites)

    @staticmethod
    @hookimpl
    def trainable_mask(method: Composite, adapter: Adapter) -> dict[str, bool]:  # type: ignore[override]
        frozen: set[int] = set()
        for _, part, child in _children(method, adapter):
            mask = registry.call("trainable_mask", part, adapter=child)
            frozen |= {id(p) for name, p in child.named_parameters() if not mask[name]}
        return {name: id(p) not in frozen for name, p in adapter.named_parameters()}

    @staticmethod
    @hookimpl
    def parameter_groups(method: Composite, adapter: Adapter, lr: float | None) -> list[Group]:  # type: ignore[override]
        names = {id(p): name for name, p in adapter.named_parameters() if p.requires_grad}
        groups: list[Group] = []
        for _, part, child in _children(method, adapter):
            theirs = dict(child.named_parameters())
            for group in registry.call("parameter_groups", part, adapter=child, lr=lr):
                there = [names.pop(id(theirs[n]), None) for n in group.names]
                groups.append(_group([n for n in there if n is not None], group.lr, group.weight_decay))
        return [*groups, _group(list(names.values()), method.lr if lr is None else lr, method.weight_decay)]

    @staticmethod
    @hookimpl
    def prepare(method: Composite, adapter: Adapter, call: Call) -> dict[str, Tensor]:
        prepared: dict[str, Any] = {}
        for name, part, child in _children(method, adapter):
            if part.prepares:
                found = part.prepare(part, child, call)  # type: ignore[attr-defined]
                prepared.update({f"{name}/{key}": tensor for key, tensor in found.items()})
        return prepared

    @staticmethod
    @hookimpl
    def auxiliary_loss(method: Composite, adapter: Adapter) -> Tensor | None:
        total: Tensor | None = None
        for _, part, child in _children(method, adapter):
            if registry.implements(part, "auxiliary_loss"):
                term = registry.call("auxiliary_loss", part, adapter=child)
                total = term if total is None else total if term is None else total + term
        return total

    @staticmethod
    @hookimpl
    def stages(method: Composite, adapter: Adapter) -> list[Stage]:
        return [
            replace(stage, name=f"{name}/{stage.name}", finish=stage.finish and partial(_finish, name, stage))
            for name, part, child in _children(method, adapter)
            if registry.implements(part, "stages")
            for stage in registry.call("stages", part, adapter=child)
        ]


def _children(method: Composite, adapter: Adapter) -> Iterator[tuple[str, Method, Adapter]]:
    for name, part in method.inside().items():
        yield name, part, adapter.children[name]


def _finish(name: str, stage: Stage, adapter: Adapter) -> None:
    assert stage.finish is not None
    stage.finish(adapter.children[name])


def _group(names: list[str], lr: float, weight_decay: float | None) -> Group:
    from inlay.training import Group

    return Group(names, lr, weight_decay)
