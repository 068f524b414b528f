"""The low-rank factors that every method of this family is built on, and their settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import Init, Method, OutputDelta, Site, setting


@dataclass(frozen=True)
class LowRankMethod(Method):
    """Settings of s·B A: A (rank, in), B (out, rank), s = alpha / rank, or alpha / √rank ("rsqrt")."""

    rank: int = setting(8, least=1)
    alpha: float = setting(8.0, above=0)
    dropout: float = setting(0.0, least=0, below=1)
    scaling: Literal["standard", "rsqrt"] = setting("standard")
    init: Literal["kaiming", "gaussian"] = setting("kaiming")

    @property
    def scale(self) -> float:
        """The factor s in front of B A."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))


class LowRank(OutputDelta):
    """The factors `down` = A (r, in) and `up` = B (out, r) at a linear layer; B starts at 0."""

    def __init__(self, site: Site, init: Init, method: LowRankMethod) -> None:
        super().__init__()
        shape = (method.rank, site.in_features)
        gaussian = method.init == "gaussian"
        self.down = init.normal(*shape, std=1 / method.rank) if gaussian else init.kaiming_uniform(*shape)
        self.up = init.zeros(site.out_features, method.rank)
        self.scale, self.rate = method.scale, method.dropout

    def dropped(self, x: Tensor) -> Tensor:
        """Return x (*, in) after this adapter's own dropout; x itself where there is none."""
        return F.dropout(x, self.rate) if self.rate and self.training else x

    def effect(self, x: Tensor) -> Tensor:
        """Return s·(x Aᵀ) Bᵀ (*, out) of x (*, in), in x's dtype; B A is never formed."""
        return F.linear(F.linear(x, self.down.to(x.dtype)) * self.scale, self.up.to(x.dtype))

    def product(self, like: Tensor) -> Tensor:
        """Return s·B A (out, in) in the dtype of `like`."""
        return self.scale * (self.up.to(like.dtype) @ self.down.to(like.dtype))
