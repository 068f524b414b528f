"""A rotation of what a layer reads, wherever it stands: y = (x R) Wᵀ + b, so W' = W Rᵀ."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import (
    At,
    Change,
    ConfigError,
    Delta,
    InputDelta,
    OutputDelta,
    Site,
    WeightDelta,
    Weights,
)


class Rotation(nn.Module):
    """A learned R (d, d): `forward(x)` is x (R − I), or x (Rᵀ − I) with `back`, of x (*, d)."""

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        raise NotImplementedError


class Rotated(Delta):
    """What every place of a rotation has: the rotation, and the fold W' = W Rᵀ over the rows of W."""

    def __init__(self, rotation: Rotation) -> None:
        super().__init__()
        self.rotation = rotation

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (W Rᵀ, b); a kernel counts as rows of |channels|·|kernel|."""
        rows = weight.flatten(1)
        return (rows + self.rotation(rows, back=True)).view_as(weight), bias


class AtInput(Rotated, InputDelta):
    """Δx = x (R − I): the weight is not needed."""

    def forward(self, x: Tensor, at: At) -> Tensor:
        """Return Δx (*, in) of x (*, in)."""
        change: Tensor = self.rotation(x)
        return change


class AtSlice(Rotated, OutputDelta):
    """Δy = x (R − I) Wᵀ: the other slices of a fused projection read the same x unturned."""

    reads: ClassVar[frozenset[str]] = frozenset({"weight"})

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of x (*, in)."""
        return F.linear(self.rotation(x), at.weight.to(x.dtype))


class AtKernel(Rotated, WeightDelta):
    """W' = W Rᵀ of a convolution: patches overlap, so what it reads cannot be turned instead."""

    reads: ClassVar[frozenset[str]] = frozenset({"weight"})

    def forward(self, level: Weights) -> Change:
        """Return W (Rᵀ − I) (out, in, *kernel)."""
        return Change(weight=self.fold(level.weight, None)[0] - level.weight)


class AtTable(Rotated, OutputDelta):
    """Δe = e (R − I): the rows E[t] of an embedding are what it gives."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δe (*, d) of e (*, d)."""
        change: Tensor = self.rotation(y)
        return change

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return E R for the table E (V, d)."""
        return weight + self.rotation(weight), bias


def width(site: Site) -> int:
    """Return how many features R turns: a layer's inputs, an embedding's outputs."""
    if site.kind == "conv":
        weight: Any = site.module.weight
        return int(weight[0].numel())
    return site.out_features if site.kind == "embedding" else site.in_features


def rotated(site: Site, rotation: Rotation, dropout: float = 0.0) -> Rotated:
    """Return the delta that turns what `site` reads by `rotation`."""
    if site.kind == "conv":
        if dropout:
            raise ConfigError(
                "a convolution's weight is turned, and dropout has no weight form",
                saw=f"dropout={dropout} at {site.name}",
                do="leave dropout out, or choose other targets",
            )
        return AtKernel(rotation)
    if site.kind == "embedding":
        return AtTable(rotation)
    return AtInput(rotation) if "input" in site.faces else AtSlice(rotation)
