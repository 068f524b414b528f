"""(IA)^3: learned rescaling of keys, values and the feed-forward's inner activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from inlay.authoring import At, Init, InputDelta, Method, OutputDelta, Site


class OutputScale(OutputDelta):
    """Δy = (l − 1)⊙y. `scale` (out,) is l − 1 and starts at 0."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.scale = init.zeros(site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of y (*, out)."""
        return self.scale.to(y.dtype) * y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (diag(l) W, l⊙b)."""
        l = 1 + self.scale.to(weight.dtype)
        return l[:, None] * weight, None if bias is None else l * bias


class InputScale(InputDelta):
    """Δx = (l − 1)⊙x. `scale` (in,) is l − 1 and starts at 0."""

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.scale = init.zeros(site.in_features)

    def forward(self, x: Tensor, at: At) -> Tensor:
        """Return Δx (*, in) of x (*, in)."""
        return self.scale.to(x.dtype) * x

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (W diag(l), b)."""
        return weight * (1 + self.scale.to(weight.dtype)), bias


@dataclass(frozen=True)
class IA3(Method):
    """Vectors that rescale keys, values and the feed-forward's inner activation.

        k' = l_k ⊙ (W_k x + b_k),   v' = l_v ⊙ (W_v x + b_v),   ffn = W_down (l_ff ⊙ g) + b

    A `down` projection is scaled at its input (l_ff as wide as the feed-forward), every other
    target at its output. l starts at 1. On rotary models l_k acts before the rotation.

    Parameters: |k| + |v| per attention (cross attention too) + d_ff per feed-forward. No weight
    decay. arXiv 2205.05638, r-three/t-few. Differs: kept as l − 1, so that small steps survive in
    bfloat16 and adapters can be combined.
    """

    id: ClassVar[str] = "ia3"
    paper: ClassVar[str] = "2205.05638"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    default_targets: ClassVar[tuple[str, ...]] = ("key", "value", "down")
    lr: ClassVar[float] = 2e-2
    weight_decay: ClassVar[float | None] = 0.0

    def delta(self, site: Site, init: Init) -> OutputScale | InputScale:
        return InputScale(site, init) if site.role == "down" else OutputScale(site, init)
