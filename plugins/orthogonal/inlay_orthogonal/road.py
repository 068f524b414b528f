"""RoAd: what a layer gives, turned in the planes of pairs of features and scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inlay.authoring import At, ConfigError, Init, Method, OutputDelta, Site, setting
from inlay_orthogonal.blocks import check_divides

SHARE = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # angles per output feature


class Turned(OutputDelta):
    """Δy = (c₁ − 1)⊙y + c₂⊙rot(y), c₁ = α cos θ, c₂ = α sin θ. `angle` is θ, `scale` α − 1; both start at 0.

    Both hold the numbers of one group after the other, (out/g, n): n = g/2 for the two halves alike
    ("road_1"), g one per feature ("road_2"), or 2g, first those of c₁, then those of c₂ ("road_4").
    """

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, site: Site, init: Init, method: RoAd) -> None:
        super().__init__()
        check_divides("group_size", method.group_size, site.out_features, site, step=2)
        self.groups, self.variant = site.out_features // method.group_size, method.variant
        count = int(site.out_features * SHARE[method.variant])
        self.angle, self.scale = init.zeros(count), init.zeros(count)

    def coefficients(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return c₁ − 1 and c₂ (out/g, g) in the dtype of `like`, computed in float32 or wider."""
        wide = torch.float64 if torch.float64 in (like.dtype, self.angle.dtype) else torch.float32
        angle, scale = (t.to(wide).view(self.groups, -1) for t in (self.angle, self.scale))
        less = scale * angle.cos() - 2 * (angle / 2).sin().square()  # α cos θ − 1, small numbers kept
        c2 = (1 + scale) * angle.sin()
        if self.variant == "road_1":
            less, c2 = less.repeat(1, 2), c2.repeat(1, 2)
        elif self.variant == "road_4":
            size = less.shape[1] // 2
            less, c2 = less[:, :size], c2[:, size:]
        return less.to(like.dtype), c2.to(like.dtype)

    def change(self, y: Tensor) -> Tensor:
        """Return Δy (*, out) of y (*, out); rot(y) = (−y₂, y₁) on the two halves of each group."""
        less, c2 = self.coefficients(y)
        grouped = y.unflatten(-1, (self.groups, -1))
        first, second = grouped.chunk(2, -1)
        return torch.addcmul(less * grouped, c2, torch.cat((-second, first), -1)).flatten(-2)

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of y (*, out)."""
        return self.change(y)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (R W, R b)."""
        return weight + self.change(weight.mT).mT, None if bias is None else bias + self.change(bias)


@dataclass(frozen=True)
class RoAd(Method):
    """Two-dimensional rotary adaptation: pairs of output features are turned in their plane and scaled.

        y' = c₁ ⊙ y + c₂ ⊙ rot(y),   c₁ = α cos θ,   c₂ = α sin θ,   y = x Wᵀ + b

    In each group of g = `group_size` features, feature j pairs with j + g/2; rot(y) = (−y₂, y₁) on
    the halves. θ = 0 and α = 1 at the start. variant="road_1": one θ and α per pair; "road_2": per feature;
    "road_4": others for c₁ than for c₂. W' = R W, b' = R b. The group size orders the features, no more.

    Parameters: out per layer, 2·out ("road_2"), 4·out ("road_4"). No weight decay. arXiv 2409.00119,
    BaohaoLiao/road. Differs: α is kept as α − 1.
    """

    id: ClassVar[str] = "road"
    paper: ClassVar[str] = "2409.00119"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    lr: ClassVar[float] = 1e-2
    weight_decay: ClassVar[float | None] = 0.0

    variant: Literal["road_1", "road_2", "road_4"] = setting("road_1")
    group_size: int = setting(64, least=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise ConfigError(
                "features of an odd group cannot be paired",
                saw=f"group_size={self.group_size}",
                do="give an even group_size",
            )

    def delta(self, site: Site, init: Init) -> Turned:
        return Turned(site, init, self)
