"""What several methods here are built on: a module that all layers share, computed factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from inlay.authoring import Adapter, Delta, Factored, LinearDelta, Method, Ref, Site, hookimpl, setting


@dataclass(frozen=True)
class SharingMethod(Method):
    """A method with one module for all its layers, and a delta that refers to it at each."""

    dropout: float = setting(0.0, least=0, below=1)

    def common(self, sites: Sequence[Site], adapter: Adapter) -> nn.Module:
        """Return what all sites share."""
        raise NotImplementedError

    def beside(self, site: Site, adapter: Adapter, common: Ref) -> Delta:
        """Return the delta of one site."""
        raise NotImplementedError

    @staticmethod
    @hookimpl
    def inject(method: SharingMethod, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        common = adapter.share("common", method.common(sites, adapter))
        for site in sites:
            adapter.place(site, method.beside(site, adapter, common))
        return len(sites)


@dataclass(frozen=True)
class ProjectingMethod(SharingMethod):
    """One whose layers share frozen random matrices, drawn from `key` and saved only if asked."""

    key: int = setting(0, least=0)
    save_projection: bool = setting(False)


class FactoredDelta(LinearDelta):
    """ΔW = B A, from two factors that are computed."""

    def factors(self, like: Tensor) -> Factored:
        """Return A (r, in) and B (out, r) in the dtype of `like`."""
        raise NotImplementedError

    def effect(self, x: Tensor) -> Tensor:
        """Return (x Aᵀ) Bᵀ (*, out) of x (*, in), ΔW not formed."""
        return self.factors(x).effect(x)

    def product(self, like: Tensor) -> Tensor:
        """Return B A (out, in)."""
        return self.factors(like).dense(like)
