"""What LoHa and LoKr share: a change of a layer's weight rebuilt from factors, convolutions included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import At, LinearDelta, Method, ModuleSite, Site, setting


@dataclass(frozen=True)
class RebuiltMethod(Method):
    """Settings of s·ΔW, s = alpha / rank, and of what is dropped of it in training.

    `rank_dropout` drops output features, `module_dropout` the whole change of a call.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv"})

    rank: int = setting(8, least=1)
    alpha: float = setting(8.0, above=0)
    rank_dropout: float = setting(0.0, least=0, below=1)
    rank_dropout_scale: bool = setting(True)
    module_dropout: float = setting(0.0, least=0, below=1)
    effective_conv: bool = setting(False)

    @property
    def dropout(self) -> float:
        """What has no weight form, as core asks of layers of which only the weights are read."""
        return max(self.rank_dropout, self.module_dropout)


class Rebuilt(LinearDelta):
    """ΔW shaped like the layer's weight, a convolution's (out, in/groups, *kernel) run as the layer's is."""

    def __init__(self, method: RebuiltMethod) -> None:
        super().__init__()
        self.scale, self.method = method.alpha / method.rank, method

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy of x: (*, out) of (*, in), or (B, out, …) of (B, in, …)."""
        if at.site.kind != "conv":
            return self.kept(self.effect(x), -1)
        conv: Any = at.site.module
        return self.kept(conv._conv_forward(x, self.product(x), None), -1 - len(conv.kernel_size))

    def kept(self, change: Tensor, axis: int) -> Tensor:
        """Return Δy with dropout of its features, which lie along `axis`, and of all of it, in training."""
        method = self.method
        if not (self.training and method.dropout):
            return change
        shape = [1] * change.dim()
        shape[axis] = change.shape[axis]
        rows = F.dropout(change.new_ones(shape), method.rank_dropout)
        if not method.rank_dropout_scale:
            rows = rows * (1 - method.rank_dropout)
        return change * rows * (torch.rand((), device=change.device) >= method.module_dropout)


def shape_of(site: Site) -> tuple[int, ...]:
    """Return the shape of a layer's weight: (out, in), or (out, in/groups, *kernel)."""
    if site.kind != "conv":
        return site.out_features, site.in_features
    assert isinstance(site, ModuleSite)
    weight: Any = site.module.weight
    return tuple(weight.shape)
