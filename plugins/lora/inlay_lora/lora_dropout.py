"""LoRA Dropout: whole columns of A and rows of B are left out at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import At, Init, Site, setting
from inlay_lora.factors import LowRank, LowRankMethod


class Sparse(LowRank):
    """Δy = s·(x Âᵀ) B̂ᵀ, Â = A diag(m_A), B̂ = diag(m_B) B, with m_A (in,), m_B (out,) ~ Bern(1 − p).

    One draw per call for all tokens and samples, while the delta is in training mode.
    """

    def __init__(self, site: Site, init: Init, method: LoRADropout) -> None:
        super().__init__(site, init, method)
        self.kept = (1 - self.rate) ** 2  # the share of ΔW's entries that a draw leaves
        if not method.rescale:
            self.scale *= self.kept

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of x (*, in)."""
        if not (self.training and self.rate):
            return self.completed(self.effect(x), x, x, at)
        down, up = self.down * self.drawn(self.down[0]), self.up * self.drawn(self.up[:, :1])
        change = F.linear(F.linear(x, down.to(x.dtype)) * (self.scale / self.kept), up.to(x.dtype))
        return self.completed(change, x, x, at)

    def drawn(self, like: Tensor) -> Tensor:
        """Return a mask shaped like `like`: 0 with probability p, else 1."""
        return (torch.rand(like.shape, device=like.device) >= self.rate).to(like.dtype)


@dataclass(frozen=True)
class LoRADropout(LowRankMethod):
    """LoRA that learns with whole columns of A and rows of B left out, drawn anew in every call.

        y = x Wᵀ + b + s·(x Âᵀ) B̂ᵀ,   Â = A diag(m_A), B̂ = diag(m_B) B,   m ~ Bern(1 − p), p = dropout

    The rank is never dropped. Outside training the whole change acts, times (1 − p)², the share of its
    entries that a draw leaves; this is what merges. With `rescale` training divides by (1 − p)²
    instead. Within `ensemble(model)` masks are drawn in evaluation mode too: average the
    probabilities of some calls. p = 0 is LoRA.

    Parameters: r·(in + out) per layer. arXiv 2404.09610; no code by its authors. Differs: one draw
    per call; for the mean over N draws give N batches to one optimizer step.
    """

    id: ClassVar[str] = "lora_dropout_rows"
    paper: ClassVar[str] = "2404.09610"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    lr: ClassVar[float] = 5e-3
    keeps_start: ClassVar[bool] = False

    dropout: float = setting(0.5, least=0, below=1)
    rescale: bool = setting(False)

    def delta(self, site: Site, init: Init) -> Sparse:
        return Sparse(site, init, self)


@contextmanager
def ensemble(model: nn.Module) -> Iterator[None]:
    """Draw LoRA Dropout's masks within the block, whatever mode the model is in.

    with ensemble(model), torch.no_grad():
        p = sum(model(**batch).logits.softmax(-1) for _ in range(4)) / 4
    """
    still = [m for m in model.modules() if isinstance(m, Sparse) and not m.training]
    for delta in still:
        delta.training = True
    try:
        yield
    finally:
        for delta in still:
            delta.training = False
