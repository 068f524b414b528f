"""Blocks of a rotation: from skew matrices, applied to groups of features, some left out in training.

One direction everywhere: R = (I + S)(I − S)⁻¹, by Cayley's map and by its series alike. What is
computed is R − I, so that small rotations survive in few bits and S = 0 changes nothing at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.authoring import ConfigError, Site


def skew(upper: Tensor, size: int) -> Tensor:
    """Return S = U − Uᵀ (*, b, b) of strict upper triangles (*, b(b−1)/2) read row by row, in float32."""
    upper = upper if upper.dtype == torch.float64 else upper.float()
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    full = upper.new_zeros(*upper.shape[:-1], size, size)
    full[..., rows, columns] = upper
    return full - full.mT


def cayley(s: Tensor) -> Tensor:
    """Return R − I = 2 (I − S)⁻¹ S (*, b, b) of skew S: R is orthogonal."""
    return torch.linalg.solve(torch.eye(s.shape[-1], dtype=s.dtype, device=s.device) - s, 2 * s)


def series(s: Tensor, terms: int) -> Tensor:
    """Return (I + S)(I + S + … + S^(T−2)) − I (k, b, b): Neumann's series of Cayley's map, T terms.

    R Rᵀ = I − S^(2T−2) if T is even, (I − S^(T−1))² if T is odd, where ‖S‖ < 1.
    """
    twice, change = 2 * s, s
    for _ in range(terms - 2):
        change = torch.baddbmm(twice, s, change)
    return change


def within(s: Tensor, radius: float) -> Tensor:
    """Return S (k, b, b) with each block whose Frobenius norm is above `radius` scaled down to it."""
    norm = s.norm(dim=(-2, -1), keepdim=True)
    return s * (radius / norm.clamp(min=radius))


def by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x (*, k·b) times the block diagonal of blocks (k, b, b), or of one (1, b, b) repeated."""
    if len(blocks) == 1:
        return (x.unflatten(-1, (-1, blocks.shape[-1])) @ blocks[0]).flatten(-2)
    return torch.einsum("...ki,kij->...kj", x.unflatten(-1, (len(blocks), -1)), blocks).flatten(-2)


def some_left_out(change: Tensor, rate: float) -> Tensor:
    """Return R − I (m, k, b, b) with ⌊rate·k⌋ blocks, drawn anew, of one of the m factors put to 0."""
    factors, blocks = change.shape[:2]
    out = torch.rand(blocks, device=change.device).argsort() < int(rate * blocks)
    factor = torch.rand(factors, device=change.device).argsort() == 0
    return change.masked_fill((factor[:, None] & out)[..., None, None], 0.0)


def check_divides(name: str, size: int, features: int, site: Site, step: int = 1) -> None:
    """Raise unless blocks of `size` features make up all of a site's, which may be 2, 2 + `step`, …."""
    if features % size:
        works = [str(n) for n in range(2, features + 1, step) if features % n == 0]
        raise ConfigError(
            f"{name}={size} does not divide the features of a layer",
            saw=f"{site.name} has {features}",
            do=f"give {name}={', '.join(works)}, or choose other targets"
            if works
            else "choose other targets",
        )
