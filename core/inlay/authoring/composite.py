"""Composites: methods made of other methods, whose contributions they combine at each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inlay.delta import Delta
from inlay.hookspecs import hookimpl
from inlay.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from inlay.adapter import Adapter, Init
    from inlay.context import Call
    from inlay.sites import Site


@dataclass(frozen=True, kw_only=True)
class Composite(Method):
    """A method holding other methods: gates around them, mixtures of them, attention over them.

    Core resolves each child's own targets and places it; `combine` gets the children's deltas at
    a site and returns the one delta that stands there. It calls theirs by their face:
    `child(x, y, at)` gives Δy, an attention child's `child(at)` gives `KeyValues`.
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

    @staticmethod
    @hookimpl
    def inject(method: Composite, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        children = {name: adapter.child(name, part) for name, part in method.parts().items()}
        for site in sites:
            here = {name: child.at(site) for name, child in children.items() if child.at(site)}
            adapter.place(site, method.combine(site, here, adapter.init(site)))
        return len(sites)

    @staticmethod
    @hookimpl
    def prepare(method: Composite, adapter: Adapter, call: Call) -> dict[str, Tensor]:
        prepared: dict[str, Any] = {}
        for name, part in method.parts().items():
            if part.prepares:
                prepared.update(part.prepare(part, adapter.children[name], call))  # type: ignore[attr-defined]
        return prepared
