"""MoSLoRA: LoRA with a learned mixer between its factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import At, Init, Site, setting
from inlay_lora.factors import LowRank, LowRankMethod


class Mixed(LowRank):
    """Δy = s·((x Aᵀ) Mᵀ) Bᵀ: LoRA's factors and `mixer` = M (r, r)."""

    def __init__(self, site: Site, init: Init, method: MoSLoRA) -> None:
        super().__init__(site, init, method)
        self.mixer = init.tensor(start(len(self.down), init, method.mixer))

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return M A (r, in) and B (out, r)."""
        return self.mixer.to(dtype) @ self.down.to(dtype), self.up.to(dtype)

    def effect(self, x: Tensor, at: At | None = None) -> Tensor:
        """Return s·((x Aᵀ) Mᵀ) Bᵀ (*, out) of x (*, in), in x's dtype; M A is never formed."""
        inner = F.linear(F.linear(x, self.down.to(x.dtype)), self.mixer.to(x.dtype))
        return F.linear(inner * self.scale, self.up.to(x.dtype))


def start(rank: int, init: Init, how: str) -> Tensor:
    """Return where M (rank, rank) starts."""
    if how == "eye" or init.device.type == "meta":
        return torch.eye(rank)
    drawn = init.normal(rank, rank) if how == "orthogonal" else init.kaiming_uniform(rank, rank)
    return torch.linalg.qr(drawn.float()).Q if how == "orthogonal" else drawn


@dataclass(frozen=True)
class MoSLoRA(LowRankMethod):
    """A mixture of subspaces: a learned r × r matrix between LoRA's factors mixes their ranks.

        y = x Wᵀ + b + s·((drop(x) Aᵀ) Mᵀ) Bᵀ,   A (r, in), M (r, r), B (out, r)

    A and s as LoRA's, B = 0. M starts Kaiming-uniform, U(±1/√r), or with `mixer` orthogonal or the
    identity, from which it is LoRA at first; all three learn. Weight decay pulls M to 0, not to I.
    For serving it is a LoRA of the same rank: A' = M A.

    Parameters: r·(in + out) + r² per layer. arXiv 2406.11909, wutaiqiang/MoSLoRA. Left out: embeddings
    and convolutions. Differs: defaults of rank and alpha are this family's (authors: 16, 32).
    """

    id: ClassVar[str] = "moslora"
    paper: ClassVar[str] = "2406.11909"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    default_targets: ClassVar[tuple[str, ...]] = ("query", "key", "value", "up", "down")
    lr: ClassVar[float] = 2e-3
    keeps_start: ClassVar[bool] = False

    mixer: Literal["kaiming", "orthogonal", "eye"] = setting("kaiming")

    def delta(self, site: Site, init: Init) -> Mixed:
        return Mixed(site, init, self)
