"""DoRA: a low-rank change of a weight's direction, and a magnitude of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import Adapter, At, Group, Init, Site, hookimpl, setting, two_rates
from inlay_lora.factors import LowRank, LowRankMethod
from inlay_lora.start import Layer


class Decomposed(LowRank):
    """Δy = (c − 1)·x̃ Wᵀ + c·s·(x̃ Aᵀ) Bᵀ, c = m / ‖W + s B A‖ by rows, x̃ = drop(x).

    W is the level below. `magnitude` (out,) is m − ‖W‖ and starts at 0.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"y", "weight"})

    def __init__(self, site: Site, init: Init, method: DoRA) -> None:
        super().__init__(site, init, method)
        self.magnitude, self.constant_norm = init.zeros(site.out_features), method.detach_norm
        if not (method.starts_as_identity or init.later):
            weight = Layer(site, method.r, method.scale).weight()
            grown = weight + self.product(weight)
            self.magnitude = init.tensor(grown.norm(dim=1) - weight.norm(dim=1))

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of x (*, in) and y (*, out)."""
        assert at.level is not None
        weight, bias, squares = at.level.measured()
        dropped = self.dropped(x)
        if dropped is not x:
            plain = F.linear(dropped, weight.to(x.dtype))
        else:
            plain = y if bias is None else y - bias.to(y.dtype)
        c = self.factor(weight.detach(), squares)
        change = (c - 1).to(y.dtype) * plain + c.to(y.dtype) * self.effect(dropped)
        return self.completed(change, x, dropped, at)

    def factor(self, weight: Tensor, squares: Tensor) -> Tensor:
        """Return c (out,) for W (out, in) and Σⱼ Wᵢⱼ² (out,); gradients flow into ‖V‖ where asked for.

        ‖W + s B A‖² = Σ W² + 2s Σ B∘(W Aᵀ) + s² Σ (B A Aᵀ)∘B over each row, without forming B A.
        """
        learns = torch.is_grad_enabled() and not self.constant_norm
        with torch.set_grad_enabled(learns), torch.autocast(weight.device.type, enabled=False):
            down, up = self.pair(weight.dtype)
            change = 2 * F.linear(weight, down) + self.scale * (up @ (down @ down.T))
            squared = squares + self.scale * (up * change).sum(1)
            norm = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
            start = squares.sqrt()
        return (start + self.magnitude.to(start.dtype)) / norm

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (m / ‖V‖ · V, b) with V = W + s B A; the bias is not scaled."""
        direction = weight + self.product(weight)
        magnitude = weight.norm(dim=1) + self.magnitude.to(weight.dtype)
        norm = direction.norm(dim=1).clamp(min=torch.finfo(weight.dtype).tiny)
        return (magnitude / norm)[:, None] * direction, self.folded(bias, weight)


@dataclass(frozen=True)
class DoRA(LowRankMethod):
    """Weights decomposed into magnitude and direction; LoRA moves the direction, m the magnitude.

        W' = m / ‖V‖ · V,   V = W + s B A,   ‖·‖ of each row of (out, in)

    A (r, in) Kaiming-uniform, B (out, r) = 0 unless `start` says otherwise, s as LoRA's, m (out,) =
    ‖W‖: starts at the base model up to rounding. Gradients do not flow into ‖V‖ (the paper's section
    4.3); with detach_norm=False they do, into A and B, though not into what lies below. The layer's
    bias is not scaled. W is the level below, so a second DoRA decomposes what the first gives.

    Parameters: r·(in + out) + out. arXiv 2402.09353, NVlabs/DoRA. Differs: m is kept as its
    difference from ‖W‖, which bfloat16 can follow in small steps and which any level below leaves
    an identity at the start; it is exempt from weight decay. Left out: convolutions, embeddings.
    """

    id: ClassVar[str] = "dora"
    paper: ClassVar[str] = "2402.09353"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    default_targets: ClassVar[tuple[str, ...]] = ("query", "key", "value", "up", "down")
    lr: ClassVar[float] = 1e-3

    detach_norm: bool = setting(True)

    def delta(self, site: Site, init: Init) -> Decomposed:
        return Decomposed(site, init, self)

    @staticmethod
    @hookimpl
    def parameter_groups(method: DoRA, adapter: Adapter, lr: float | None) -> list[Group]:  # type: ignore[override]
        return two_rates(method, adapter, lr, ".magnitude", 1.0, decay=0.0)
