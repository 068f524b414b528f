"""The Walsh-Hadamard transform of vectors, by products with small matrices."""

from __future__ import annotations

import torch
from torch import Tensor

SIDE = 64


def hadamard_matrix(size: int = SIDE) -> Tensor:
    """Return Sylvester's H (size, size) of ±1, size a power of 2: every corner (m, m) of it is one too."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def transform(v: Tensor, matrix: Tensor) -> Tensor:
    """Return H v for v (L,), L a power of 2: unnormalised, H H = L·I, and its own gradient's transform.

    H is the Kronecker product of small ones, so it acts by log₆₄ L products with `matrix` (64, 64).
    """
    done, size = 1, v.numel()
    while done < size:
        side = min(len(matrix), size // done)
        v = (matrix[:side, :side].to(v.dtype) @ v.view(-1, side, done)).reshape(-1)
        done *= side
    return v
