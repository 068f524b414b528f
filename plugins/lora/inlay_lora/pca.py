"""Principal components of rows that come in batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOTHING = 1e-5  # a singular value below this share of the largest has no direction of its own


class IncrementalPCA:
    """The first `keep` principal directions of all rows (m, d) seen, updated batch by batch.

    `directions` (k, d) are orthonormal, `singular` (k,) their singular values; k grows to `keep` with
    the rows. Exact while nothing is cut off; what is cut off at each update is lost. Signs: the
    entry of largest modulus is positive. `settled` (k,) says which the last update left in place.
    """

    def __init__(self, keep: int) -> None:
        self.keep, self.rows, self.spread = keep, 0, 0.0
        self.mean = self.directions = self.singular = torch.empty(0)
        self.cosines = torch.empty(0)

    def update(self, rows: Tensor) -> None:
        """Take in rows (m, d) by the SVD of [diag(S)·V; X − x̄; √(nm/(n+m))·(μ − x̄)]."""
        rows, before = rows.float(), self.directions
        mean = rows.mean(0)
        stack = rows - mean
        self.spread += float(stack.square().sum())
        if self.rows:
            shift = math.sqrt(self.rows * len(rows) / (self.rows + len(rows))) * (self.mean - mean)
            self.spread += float(shift.square().sum())
            stack = torch.cat([self.singular[:, None] * before, stack, shift[None]])
            mean = (self.rows * self.mean + len(rows) * mean) / (self.rows + len(rows))
        self.rows, self.mean = self.rows + len(rows), mean
        _, singular, directions = torch.linalg.svd(stack, full_matrices=False)
        self.singular, directions = singular[: self.keep], directions[: self.keep]
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        self.directions = directions * largest.sign()
        self.cosines = torch.zeros_like(self.singular)
        if k := min(len(before), len(self.directions)):
            self.cosines[:k] = (before[:k] * self.directions[:k]).sum(1).abs()

    @property
    def explained(self) -> Tensor:
        """The share (k,) of the rows' variance along each direction."""
        return self.singular.square() / max(self.spread, torch.finfo(torch.float32).tiny)

    def settled(self, tau: float) -> Tensor:
        """Say of each direction (k,) whether its cosine with what it was before is at least `tau`."""
        return (self.cosines >= tau) | (self.singular <= NOTHING * self.singular[:1])
