"""MiSS: one small matrix repeated along the input of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import At, Init, LinearDelta, Method, Site, setting
from inlay_reparam.sizes import check_divides, check_rank


class Shards(LinearDelta):
    """ΔW[o, i] = D[i mod r, o mod m]: `block` = D (r, m), zero at the start; m is out, or divides it."""

    def __init__(self, site: Site, init: Init, method: MiSS, width: int) -> None:
        super().__init__()
        self.block = init.zeros(method.rank, width)
        self.columns, self.copies, self.rate = site.in_features, site.out_features // width, method.dropout

    def effect(self, x: Tensor) -> Tensor:
        """Return (Σ_k x[.., k r:(k+1) r]) D (*, out) of x (*, in), x followed by zeros if r needs them."""
        rank = len(self.block)
        x = F.pad(x, (0, -self.columns % rank)) if self.columns % rank else x
        y = x.unflatten(-1, (-1, rank)).sum(-2) @ self.block.to(x.dtype)
        return y.repeat(*(1,) * (y.dim() - 1), self.copies) if self.copies > 1 else y

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in)."""
        repeats = -(-self.columns // len(self.block))
        return self.block.T.to(like.dtype).repeat(self.copies, repeats)[:, : self.columns]


class Tiles(LinearDelta):
    """W'_tk = W_tk + W_tk D_t + D_t for the r × r tiles of W: `block` = D (out/r, r, r) starts at 0."""

    reads: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __init__(self, site: Site, init: Init, method: MiSS) -> None:
        super().__init__()
        rank = method.rank
        self.block = init.zeros(site.out_features // rank, rank, rank)
        self.rate = method.dropout

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of x (*, in); W is the level below."""
        return F.linear(self.dropped(x), self.change(at.weight.to(x.dtype)))

    def change(self, weight: Tensor) -> Tensor:
        """Return W' − W (out, in) for W (out, in)."""
        count, rank, _ = self.block.shape
        block = self.block.to(weight.dtype)
        rows = weight.reshape(count, rank, -1, rank).transpose(1, 2)  # (t, k, r, r)
        return (rows @ block[:, None] + block[:, None]).transpose(1, 2).reshape(weight.shape)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (W', b)."""
        return weight + self.change(weight), bias


@dataclass(frozen=True)
class MiSS(Method):
    """A single small matrix D, repeated over the input of each frozen weight (Bone, DiSHA).

        mode="balance"   ΔW[o, i] = D[i mod r, o]            D (r, out): x's pieces of length r are summed
        mode="mini"      ΔW[o, i] = D[i mod r, o mod m]      D (r, m), m = mini_rank divides out
        mode="bat"       W'_tk = W_tk + W_tk D_t + D_t       D (out/r, r, r), tiles of r × r: r divides both

    D = 0: starts at the base model, with a gradient at once. W of "bat" is the level below.

    Parameters: r·out (balance, bat), r·m (mini). arXiv 2409.15371, JL-er/Bone and huggingface/peft.
    Differs from peft: in "bat" the dropout acts too, on what the change reads.
    """

    id: ClassVar[str] = "miss"
    paper: ClassVar[str] = "2409.15371"
    lr: ClassVar[float] = 1e-3

    rank: int = setting(64, least=1)
    mode: Literal["balance", "bat", "mini"] = setting("balance")
    mini_rank: int = setting(1, least=1)
    dropout: float = setting(0.0, least=0, below=1)

    def delta(self, site: Site, init: Init) -> LinearDelta:
        rows, columns = site.out_features, site.in_features
        check_rank(self, site, columns)
        if self.mode == "balance":
            return Shards(site, init, self, rows)
        if self.mode == "mini":
            check_divides("mini_rank", self.mini_rank, site, rows)
            return Shards(site, init, self, self.mini_rank)
        check_divides("rank", self.rank, site, rows, columns)
        return Tiles(site, init, self)
