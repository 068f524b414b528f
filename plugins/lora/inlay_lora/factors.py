"""The low-rank factors that every method of this family is built on, and their settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import (
    Adapter,
    At,
    ConfigError,
    Init,
    LinearDelta,
    Method,
    Site,
    by_site,
    hookimpl,
    setting,
)
from inlay_lora.drawn import Kaiming
from inlay_lora.start import DOWN, UP, Layer, Start


@dataclass(frozen=True)
class LowRankMethod(Method):
    """Settings of s·B A: A (rank, in), B (out, rank), s = alpha / rank, or alpha / √rank ("rsqrt").

    `rank` and `alpha` are one number, or a mapping from roles and names of targets (and "default").
    `start` says where A and B start. With bias="own" B has a bias that learns, times s; with "layer"
    the layers' own biases learn too, as a shift that is kept here.
    """

    rank: int | dict[str, int] = setting(8, least=1)
    alpha: float | dict[str, float] = setting(8.0, above=0)
    dropout: float = setting(0.0, least=0, below=1)
    scaling: Literal["standard", "rsqrt"] = setting("standard")
    start: Start = setting(Kaiming())
    bias: Literal["none", "own", "layer"] = setting("none")

    keeps_start: ClassVar[bool] = True  # whether B₀A₀ can be kept apart from what the method does with B A

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start.kept and not self.keeps_start:
            raise ConfigError(
                f"{self.id}: a start that is part of the base cannot be kept apart here",
                saw=f"start={self.start!r}",
                do="choose one with B = 0, such as kaiming() or gaussian()",
            )

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.start.calibrates

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        return self.start.starts_as_identity

    @property
    def r(self) -> int:
        """The rank, where it is one number: a site's own method has it so."""
        assert isinstance(self.rank, int)
        return self.rank

    @property
    def scale(self) -> float:
        """The factor s in front of B A."""
        assert isinstance(self.alpha, (int, float))
        return self.alpha / (self.r if self.scaling == "standard" else math.sqrt(self.r))

    def of_rank(self, rank: int) -> Self:
        """Return this method with another rank and the same s."""
        grown = rank / self.r
        assert isinstance(self.alpha, (int, float))
        alpha = self.alpha * (grown if self.scaling == "standard" else grown**0.5)
        return self if rank == self.r else replace(self, rank=rank, alpha=alpha)

    def by_site(self, sites: Sequence[Site]) -> list[Self]:
        """Return this method as it is at each site, its rank and alpha numbers."""
        ranks, alphas = (by_site(self.id, n, getattr(self, n), sites) for n in ("rank", "alpha"))
        pairs = list(zip(ranks, alphas, strict=True))
        made = {(rank, alpha): replace(self, rank=rank, alpha=alpha) for rank, alpha in {*pairs}}
        return [made[pair] for pair in pairs]

    @staticmethod
    @hookimpl
    def calibrate(
        method: LowRankMethod, model: nn.Module, sites: Sequence[Site], batches: Iterable[Any]
    ) -> Mapping[str, Tensor]:
        layers = [Layer(s, own.r, own.scale) for s, own in zip(sites, method.by_site(sites), strict=True)]
        return method.start.measure(layers, model, batches)

    @staticmethod
    @hookimpl
    def inject(method: LowRankMethod, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        if method.bias == "layer" and not any(site.has_bias for site in sites):  # type: ignore[attr-defined]
            raise ConfigError(
                f"{method.id}: no target has a bias that could learn",
                saw=f'bias="layer" at {sites[0].name} and {len(sites) - 1} more',
                do='give bias="own", or leave it out',
            )
        ranks = adapter.data.setdefault("ranks", {}) if method.calibrates else {}
        for site, own in zip(sites, method.by_site(sites), strict=True):
            down, up = (adapter.calibration.pop(f"{site.name}.{name}", None) for name in (DOWN, UP))
            if down is not None:
                ranks[site.name] = len(down)
            if rank := ranks.get(site.name, own.r):
                delta = adapter.place(site, own.of_rank(rank).delta(site, adapter.init(site)))
                if down is not None:  # a start is not saved: it learns
                    delta.begin(down, up)
        return len(sites)


class LowRank(LinearDelta):
    """The factors `down` = A (r, in), or (r, *row), and `up` = B (out, r) of a layer.

    From a start that is kept, ΔW = s·(B A − B₀A₀), with `down_start` = A₀ and `up_start` = B₀.
    """

    down_start: Tensor | None
    up_start: Tensor | None

    def __init__(
        self, site: Site, init: Init, method: LowRankMethod, row: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        layer = Layer(site, method.r, method.scale, row or (site.in_features,))
        check_rank(method.id, layer)
        out, rank = site.out_features, method.r
        if init.later and method.start.from_weight:
            self.down, self.up = init.zeros(rank, *layer.row), init.zeros(out, rank)
        else:
            down, up = method.start.factors(layer, init)
            self.down, self.up = init.tensor(down.reshape(rank, *layer.row)), init.tensor(up)
        for name, factor in (("down_start", self.down), ("up_start", self.up)):
            self.register_buffer(name, factor.detach().clone() if method.start.kept else None)
        biased = method.bias == "own" or (method.bias == "layer" and site.has_bias)  # type: ignore[attr-defined]
        self.bias = init.zeros(out) if biased else None
        self.scale, self.rate = method.scale, method.dropout
        self.bias_scale = method.scale if method.bias == "own" else 1.0

    @torch.no_grad()
    def begin(self, down: Tensor, up: Tensor | None = None) -> None:
        """Start at A₀ and B₀ (None: as it is)."""
        for name, factor in (("down", down), ("up", up)):
            if factor is not None:
                getattr(self, name).copy_(factor.view_as(getattr(self, name)))
                if (kept := getattr(self, f"{name}_start")) is not None:
                    kept.copy_(getattr(self, name))

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A (k, in) and B (out, k) with ΔW = s·B A: the factors, k = r.

        From a start that is kept, k = 2r: B A − B₀A₀ = (B − B₀) A + B₀ (A − A₀), which is exactly 0 at
        the start in any dtype, and keeps small steps in 16 bits.
        """
        if self.down_start is None or self.up_start is None:
            return self.down.to(dtype), self.up.to(dtype)
        wide = torch.promote_types(self.down.dtype, dtype)
        down, up = self.down.to(wide), self.up.to(wide)
        down_start, up_start = self.down_start.to(wide), self.up_start.to(wide)
        with torch.autocast(down.device.type, enabled=False):  # it joins no float16 under bfloat16
            pair = torch.cat([down, down - down_start]), torch.cat([up - up_start, up_start], 1)
        return pair[0].to(dtype), pair[1].to(dtype)

    def run(self, x: Tensor, down: Tensor, up: Tensor, at: At | None = None) -> Tensor:
        """Return s·(x Aᵀ) Bᵀ (*, out) of x (*, in); B A is never formed."""
        return F.linear(F.linear(x, down) * self.scale, up)

    def effect(self, x: Tensor, at: At | None = None) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in), in x's dtype."""
        return self.run(x, *self.pair(x.dtype), at)

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in) in the dtype of `like`."""
        down, up = self.pair(like.dtype)
        return self.scale * (up @ down.flatten(1))

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of x (*, in)."""
        dropped = self.dropped(x)
        return self.completed(self.effect(dropped, at), x, dropped, at)

    def completed(self, change: Tensor, x: Tensor, dropped: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of what B A and B₀A₀ make of `dropped`: B₀A₀ is the base's, which reads x."""
        if dropped is not x and self.down_start is not None and self.up_start is not None:
            start = self.down_start.to(x.dtype), self.up_start.to(x.dtype)
            change = change + self.run(dropped - x, *start, at)
        return change if self.bias is None else change + self.spread(self.shift(change))

    def spread(self, bias: Tensor) -> Tensor:
        """Return a vector (out,) as it is added to outputs."""
        return bias

    def shift(self, like: Tensor) -> Tensor:
        """Return what is added to the layer's bias (out,)."""
        assert self.bias is not None
        return self.bias_scale * self.bias.to(like.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (W + ΔW, b + its change)."""
        return weight + self.product(weight).view_as(weight), self.folded(bias, weight)

    def folded(self, bias: Tensor | None, like: Tensor) -> Tensor | None:
        """Return the layer's bias (out,) with its change; None if there is neither."""
        if self.bias is None:
            return bias
        return self.shift(like) if bias is None else bias + self.shift(like)


def check_rank(method: str, layer: Layer) -> None:
    """Raise if the rank is larger than a change of the layer's weight can have."""
    out, width = layer.size
    if layer.rank > (most := min(out, width)):
        key = layer.site.role or layer.name
        raise ConfigError(
            f"{method}: the rank is larger than a layer's",
            saw=f"rank {layer.rank} at {layer.name}, {width} to {out} features",
            do=f'give at most {most} there, as in rank={{"{key}": {most}, "default": {layer.rank}}}, or '
            "leave it out of the targets",
        )
