"""A method that places another and then fails, at a chosen moment, to show that this leaves no trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from inlay.adapter import Adapter
from inlay.hookspecs import hookimpl
from inlay.method import Method
from inlay.settings import setting
from inlay.sites import Site

Moment = Literal["inject", "place", "mask"]


class InjectedError(Exception):
    """The failure that was asked for."""


class Stubborn:
    """Mixin of a delta that fails when core puts it on the model and sets its mode."""

    def train(self, mode: bool = True) -> nn.Module:
        raise InjectedError("while placing")


@dataclass(frozen=True)
class Failing(Method):
    """Run `inner`, and fail at its k-th placement: while it injects, while core places, or at the mask."""

    id: ClassVar[str] = "kit_failing"
    inner: Any = setting()
    at: Moment = setting("inject")
    k: int = setting(0, least=0)

    @property
    def accepts(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self.inner.accepts)

    @property
    def default_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.inner.default_targets)

    @property
    def optional_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.inner.optional_targets)

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return bool(self.inner.calibrates)

    def parts(self) -> Mapping[str, Method]:
        return dict(self.inner.parts())

    def suits(self, site: Site) -> bool:
        return bool(self.inner.suits(site))

    @staticmethod
    @hookimpl
    def calibrate(method: Failing, model: nn.Module, sites: Sequence[Site], batches: Iterable[Any]) -> Any:
        return type(method.inner).calibrate(method.inner, model, sites, batches)

    @staticmethod
    @hookimpl
    def inject(method: Failing, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        place = adapter.place

        def counted(site: Site, delta: Any) -> Any:
            if method.at == "inject" and len(adapter.placed) == method.k:
                raise InjectedError("while injecting")
            return place(site, delta)

        adapter.place = counted  # type: ignore[method-assign]
        type(method.inner).inject(method.inner, sites, adapter)
        _, last = adapter.placed[min(method.k, len(adapter.placed) - 1)]
        if method.at == "inject":
            raise InjectedError("after injecting")
        if method.at == "place":
            object.__setattr__(last, "__class__", type("Refusing", (Stubborn, type(last)), {}))
        return len(adapter.placed)

    @staticmethod
    @hookimpl
    def trainable_mask(method: Failing, adapter: Adapter) -> dict[str, bool]:  # type: ignore[override]
        if method.at == "mask":
            raise InjectedError("at the mask")
        return dict(type(method.inner).trainable_mask(method.inner, adapter))
