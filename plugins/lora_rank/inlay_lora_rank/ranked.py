"""A low-rank change with a weight for each of its ranks: what the methods of this family are built on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import ConfigError, Init, LinearDelta, Method, Site, setting


@dataclass(frozen=True)
class RankedMethod(Method):
    """Settings of s·B diag(c) A: A (rank, in), B (out, rank), c (rank,)."""

    rank: int = setting(8, least=1)
    alpha: float = setting(8.0, above=0)
    dropout: float = setting(0.0, least=0, below=1)

    made: ClassVar[type[Ranked]]

    def delta(self, site: Site, init: Init) -> Ranked:
        if self.rank > (most := min(site.in_features, site.out_features)):
            raise ConfigError(
                f"{self.id}: the rank is larger than a layer's",
                saw=f"rank {self.rank} at {site.name}, {site.in_features} to {site.out_features} features",
                do=f"give at most {most}, or leave the layer out of the targets",
            )
        return self.made(site, init, self)


class Ranked(LinearDelta):
    """Δy = ((drop(x) Aᵀ) ⊙ c) Bᵀ: `down` = A (r, in), `up` = B (out, r), and c (r,) from `weights`."""

    def __init__(self, down: nn.Parameter, up: nn.Parameter, rate: float) -> None:
        super().__init__()
        self.down, self.up, self.rate = down, up, rate

    def weights(self) -> Tensor:
        """Return c (r,) outside training, the method's scale in it."""
        raise NotImplementedError

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in), in x's dtype."""
        return self.applied(x, self.down, self.weights(), self.up)

    def applied(self, x: Tensor, down: Tensor, c: Tensor, up: Tensor) -> Tensor:
        """Return ((x Aᵀ) ⊙ c) Bᵀ (*, out) of x (*, in), in x's dtype."""
        return F.linear(F.linear(x, down.to(x.dtype)) * c.to(x.dtype), up.to(x.dtype))

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW = B diag(c) A (out, in) in the dtype of `like`."""
        down, c, up = (tensor.to(like.dtype) for tensor in (self.down, self.weights(), self.up))
        return (up * c) @ down
