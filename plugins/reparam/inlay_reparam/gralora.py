"""GraLoRA: a grid of blocks, each with a low-rank change of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import ConfigError, Init, LinearDelta, Method, Site, setting
from inlay_reparam.sizes import check_divides, check_most, divisors, shown


class Granular(LinearDelta):
    """Block (j, n) of ΔW: s·(A_n[:, piece j] B_j[piece n])ᵀ, `down` = A (k, in/k, r), `up` = B (k, r, out/k).

    With `hybrid_rank` a plain low-rank pair besides: `hybrid_down` (q, in), `hybrid_up` (out, q).
    """

    def __init__(self, site: Site, init: Init, method: GraLoRA) -> None:
        super().__init__()
        k, r, q = method.k, method.rank, method.hybrid_rank
        fan_in = site.in_features // k
        self.down = init.uniform(k, fan_in, r, bound=fan_in**-0.5)
        self.up = init.zeros(k, r, site.out_features // k)
        self.hybrid_down = init.kaiming_uniform(q, site.in_features) if q else None
        self.hybrid_up = init.zeros(site.out_features, q) if q else None
        self.scale, self.rate = method.alpha / (r + q), method.dropout

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in): each block's inputs by A, pieces exchanged, by B."""
        k, _, r = self.down.shape
        inner = torch.einsum("...ni,nir->...nr", x.unflatten(-1, (k, -1)), self.scale * self.down.to(x.dtype))
        inner = inner.unflatten(-1, (k, r // k)).transpose(-3, -2).flatten(-2)
        y = torch.einsum("...jr,jro->...jo", inner, self.up.to(x.dtype)).flatten(-2)
        if self.hybrid_down is None or self.hybrid_up is None:
            return y
        plain = F.linear(x, self.hybrid_down.to(x.dtype)) * self.scale
        return y + F.linear(plain, self.hybrid_up.to(x.dtype))

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in) in the dtype of `like`."""
        k = len(self.down)
        down = self.down.to(like.dtype).unflatten(-1, (k, -1))  # (n, i, j, piece)
        up = self.up.to(like.dtype).unflatten(1, (k, -1))  # (j, n, piece, o)
        change = torch.einsum("nijp,jnpo->joni", down, up).flatten(2).flatten(0, 1)
        if self.hybrid_down is not None and self.hybrid_up is not None:
            change = change + self.hybrid_up.to(like.dtype) @ self.hybrid_down.to(like.dtype)
        return self.scale * change


@dataclass(frozen=True)
class GraLoRA(Method):
    """Granular low-rank adaptation: a k × k grid of blocks, each with a change of rank r/k of its own.

        h_n = x_n A_n,   y_j += s·[piece j of h_0, …, h_{k−1}] B_j,   A (k, in/k, r), B (k, r, out/k)

    s = alpha / (rank + hybrid_rank). A ~ U(±√(k/in)), B = 0; the plain pair of `hybrid_rank` starts as
    LoRA's. The change has rank up to k·r. k = 1 is LoRA.

    Parameters: (r + hybrid_rank)·(in + out) per layer, as LoRA's. arXiv 2505.20355,
    SqueezeBits/GraLoRA, huggingface/peft.
    """

    id: ClassVar[str] = "gralora"
    paper: ClassVar[str] = "2505.20355"
    lr: ClassVar[float] = 1e-3

    rank: int = setting(32, least=1)
    alpha: float = setting(64.0, above=0)
    k: int = setting(2, least=1)
    hybrid_rank: int = setting(0, least=0)
    dropout: float = setting(0.0, least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % self.k:
            raise ConfigError(
                "gralora: the rank is shared out among the k blocks of a row, so k divides it",
                saw=f"rank={self.rank}, k={self.k}",
                do=f"take k among {', '.join(map(str, divisors(self.rank)))}, or another rank",
            )

    def delta(self, site: Site, init: Init) -> Granular:
        check_divides("k", self.k, site, site.in_features, site.out_features)
        most = min(site.in_features, site.out_features)
        check_most("rank + hybrid_rank", self.rank + self.hybrid_rank, most, shown(site))
        return Granular(site, init, self)
