"""The low-rank factors that every method of this family is built on, and their settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import Adapter, Init, LinearDelta, Method, Site, hookimpl, setting
from inlay_lora.start import DOWN, Start


@dataclass(frozen=True)
class LowRankMethod(Method):
    """Settings of s·B A: A (rank, in), B (out, rank), s = alpha / rank, or alpha / √rank ("rsqrt").

    A starts at random as `init` says, or where `start` finds that it should.
    """

    rank: int = setting(8, least=1)
    alpha: float = setting(8.0, above=0)
    dropout: float = setting(0.0, least=0, below=1)
    scaling: Literal["standard", "rsqrt"] = setting("standard")
    init: Literal["kaiming", "gaussian"] = setting("kaiming")
    start: Start | None = setting(None)

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.start is not None

    @property
    def scale(self) -> float:
        """The factor s in front of B A."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def of_rank(self, rank: int) -> Self:
        """Return this method with another rank and the same s."""
        grown = rank / self.rank
        return replace(
            self, rank=rank, alpha=self.alpha * (grown if self.scaling == "standard" else grown**0.5)
        )

    @staticmethod
    @hookimpl
    def calibrate(
        method: LowRankMethod, model: nn.Module, sites: Sequence[Site], batches: Iterable[Any]
    ) -> Mapping[str, Tensor]:
        assert method.start is not None
        return method.start.measure(method.rank, model, sites, batches)

    @staticmethod
    @hookimpl
    def inject(method: LowRankMethod, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        ranks = {} if method.start is None else adapter.data.setdefault("ranks", {})
        for site in sites:
            start = adapter.calibration.pop(f"{site.name}{DOWN}", None)  # a start is not saved: it learns
            if start is not None:
                ranks[site.name] = len(start)
            if rank := ranks.get(site.name, method.rank):
                own = method if rank == method.rank else method.of_rank(rank)
                delta = adapter.place(site, own.delta(site, adapter.init(site)))
                if start is not None:
                    with torch.no_grad():
                        delta.down.copy_(start)
        return len(sites)


class LowRank(LinearDelta):
    """The factors `down` = A (r, in), or (r, *inner), and `up` = B (out, r) of a layer; B starts at 0."""

    def __init__(
        self, site: Site, init: Init, method: LowRankMethod, inner: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        shape = (method.rank, *(inner or (site.in_features,)))
        gaussian = method.init == "gaussian"
        self.down = init.normal(*shape, std=1 / method.rank) if gaussian else init.kaiming_uniform(*shape)
        self.up = init.zeros(site.out_features, method.rank)
        self.scale, self.rate = method.scale, method.dropout

    def effect(self, x: Tensor) -> Tensor:
        """Return s·(x Aᵀ) Bᵀ (*, out) of x (*, in), in x's dtype; B A is never formed."""
        return F.linear(F.linear(x, self.down.to(x.dtype)) * self.scale, self.up.to(x.dtype))

    def product(self, like: Tensor) -> Tensor:
        """Return s·B A (out, in) in the dtype of `like`."""
        return self.scale * (self.up.to(like.dtype) @ self.down.to(like.dtype))
