"""BOFT: what a layer reads, turned by butterfly factors, and a scale of what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inlay.authoring import Adapter, At, ConfigError, Init, Method, OutputDelta, Site, hookimpl, setting
from inlay_orthogonal.blocks import by_blocks, cayley, check_divides, skew, some_left_out
from inlay_orthogonal.rotation import Rotation, rotated, width


class Butterfly(Rotation):
    """R = F_{m−1} … F₀: `skew` (m, k, b(b−1)/2) holds the triangles of S of the blocks of each factor."""

    def __init__(self, site: Site, init: Init, method: BOFT) -> None:
        super().__init__()
        size, features = method.block_size, width(site)
        check_divides("block_size", size, features, site)
        check_butterfly(method, features, site)
        self.skew = init.zeros(method.factors, features // size, size * (size - 1) // 2)
        self.size, self.dropout = size, method.dropout

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        """Return x (R − I), or x (Rᵀ − I), of x (*, d)."""
        with torch.autocast(x.device.type, enabled=False):
            change = cayley(skew(self.skew, self.size))
        if self.dropout and self.training:
            change = some_left_out(change, self.dropout)
        change = (change.mT if back else change).to(x.dtype)
        numbers = range(len(change))
        total = x
        for i in numbers if back else reversed(numbers):
            total = total + self.factor(total, change[i], i)
        return total - x

    def factor(self, x: Tensor, change: Tensor, i: int) -> Tensor:
        """Return x (F_i − I), F_i = P_i blockdiag(…) P_iᵀ.

        P_i takes, of each group of d·2^i/k features, first the half blocks with even numbers, then the odd
        ones: both ways a transposition of (2, n) half blocks.
        """
        groups, half = len(change) >> i, self.size // 2
        if i == 0:
            return by_blocks(x, change)
        laid = x.unflatten(-1, (groups, 2, -1, half)).transpose(-3, -2).flatten(-4)
        return by_blocks(laid, change).unflatten(-1, (groups, -1, 2, half)).transpose(-3, -2).flatten(-4)


class Scale(OutputDelta):
    """Δy = (σ − 1)⊙(y − b): `scale` (out,) is σ − 1 and starts at 0; the bias is not scaled."""

    reads: ClassVar[frozenset[str]] = frozenset({"y", "weight"})

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.scale = init.zeros(site.out_features)
        self.beside = site.module.weight.dim() - 2 if site.kind == "conv" else 0  # type: ignore[operator]

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy of y: (*, out), or (B, out, …) behind a convolution."""
        shape = (-1, *(1,) * self.beside)
        bias = at.bias
        own = y if bias is None else y - bias.to(y.dtype).view(shape)
        return self.scale.to(y.dtype).view(shape) * own

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (diag(σ) W, b)."""
        sigma = 1 + self.scale.to(weight.dtype)
        return sigma.view(-1, *(1,) * (weight.dim() - 1)) * weight, bias


def check_butterfly(method: BOFT, features: int, site: Site) -> None:
    """Raise unless `factors` factors fit: half blocks to exchange, and groups that halve often enough."""
    size, factors = method.block_size, method.factors
    if factors > 1 and (size % 2 or features % (size << (factors - 1))):
        works = [
            f"block_size={b} with up to {m} factors"
            for b in range(2, features // 2 + 1, 2)
            if features % b == 0 and (m := ((n := features // b) & -n).bit_length()) > 1
        ]
        raise ConfigError(
            f"{factors} butterfly factors do not fit a layer",
            saw=f"{site.name} has {features} features, block_size={size}",
            do=f"give factors=1, or {', '.join(works[:6]) or 'choose other targets'}",
        )


@dataclass(frozen=True)
class BOFT(Method):
    """Butterfly orthogonal fine-tuning: OFT whose few small blocks, m times exchanged, mix all features.

        y = σ ⊙ ((x R) Wᵀ) + b,   R = F_{m−1} … F₀,   F_i = P_i blockdiag(R_i1 … R_ik) P_iᵀ

    R_ij = (I + S)(I − S)⁻¹ (b, b), S skew, kept as its strict upper triangle, 0 at the start; σ (out,)
    = 1. P_i permutes half blocks: the first block of factor i mixes the first half block with the
    one that lies 2^(i−1) blocks further on. `factors` = m: 1 is OFT with a scale; 1 + log₂ k mixes every
    feature with every other. `dropout` leaves that share of the blocks of one factor unturned in
    training. Convolutions: W as (out, in·|kernel|).

    Parameters: m·in·(b − 1)/2 + out per layer. No weight decay. arXiv 2311.06243, wy1iu/butterfly-oft
    and peft. Differs: both keep full blocks M (m·in·b numbers), of which S = (M − Mᵀ)/2 is used, and
    turn the other way (S for −S); σ is kept as σ − 1.
    """

    id: ClassVar[str] = "boft"
    paper: ClassVar[str] = "2311.06243"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv"})
    lr: ClassVar[float] = 1e-2
    weight_decay: ClassVar[float | None] = 0.0

    block_size: int = setting(4, least=2)
    factors: int = setting(1, least=1)
    dropout: float = setting(0.0, least=0, below=1)

    @staticmethod
    @hookimpl
    def inject(method: BOFT, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        for site in sites:
            adapter.place(site, Scale(site, adapter.init(site)))  # inside: the bias is the base's own
            turn = Butterfly(site, adapter.init(site), method)
            adapter.place(site, rotated(site, turn, method.dropout))
        return len(sites)
