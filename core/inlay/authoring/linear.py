"""A change of a linear layer's weight that is added: what most reparameterisations are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from inlay.context import At
from inlay.delta import OutputDelta


class LinearDelta(OutputDelta):
    """Δy = drop(x) ΔWᵀ, and W' = W + ΔW: the change of a linear layer, whatever ΔW (out, in) is made of.

    A subclass gives `product`, and `effect` too where Δy comes cheaper than by forming ΔW. `rate` is
    that of the dropout of what it reads. Its tensors may be of any dtype: both cast what they use.
    """

    rate: float = 0.0

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in) in the dtype of `like`, on its device."""
        raise NotImplementedError

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in), in x's dtype."""
        return F.linear(x, self.product(x))

    def dropped(self, x: Tensor) -> Tensor:
        """Return x (*, in) after this delta's own dropout; x itself where there is none."""
        return F.dropout(x, self.rate) if self.rate and self.training else x

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of x (*, in)."""
        return self.effect(self.dropped(x))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (W + ΔW, b)."""
        return weight + self.product(weight), bias
