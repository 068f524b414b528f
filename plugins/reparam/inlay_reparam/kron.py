"""Kronecker products: sizes that multiply up to a layer's, and products that are never formed."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Return (m, n) with m·n = size: m = `factor` where that divides, else the best m ≤ n and ≤ `factor`.

    −1 sets no bound, and the best is the one nearest to √size: LyCORIS's and peft's rule.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    m = next(m for m in range(most, 0, -1) if size % m == 0)
    return m, size // m


def kron_linear(x: Tensor, left: Tensor, right: Tensor, up: Tensor | None = None) -> Tensor:
    """Return x (left ⊗ right)ᵀ (*, a1·b1) of x (*, a2·b2), left (a1, a2), right (b1, b2).

    With `up` (b1, r), right (r, b2) stands for up·right: r numbers are mixed by `left`, not b1.
    """
    rows = F.linear(x.unflatten(-1, (left.shape[1], right.shape[1])), right).mT
    mixed = F.linear(rows.contiguous(), left).mT.contiguous()  # of strided ones torch chooses another product
    return (mixed if up is None else F.linear(mixed, up)).flatten(-2)
