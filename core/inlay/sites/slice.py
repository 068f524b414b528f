"""Slices of a fused projection: which of its outputs are the queries, the keys, the values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Outputs [start, stop) of each of `groups` equal groups of outputs, in order.

    One group: a contiguous run (GPT-2: queries, then keys, then values). A group a head: GPT-NeoX lays
    out each head's query, key and value beside each other.
    """

    start: int
    stop: int
    groups: int = 1

    @property
    def size(self) -> int:
        return self.groups * (self.stop - self.start)

    def take(self, whole: Tensor, dim: int) -> Tensor:
        """Return these entries of `whole` along `dim`."""
        if self.groups == 1:
            return whole.narrow(dim, self.start, self.stop - self.start)
        dim %= whole.dim()
        grouped: Tensor = torch.unflatten(whole, dim, (self.groups, -1))
        return grouped.narrow(dim + 1, self.start, self.stop - self.start).flatten(dim, dim + 1)

    def put(self, whole: Tensor, part: Tensor, dim: int) -> Tensor:
        """Return `whole` with `part` in the place of these entries along `dim`."""
        dim %= whole.dim()
        grouped, inner = (torch.unflatten(t, dim, (self.groups, -1)) for t in (whole, part))
        before = grouped.narrow(dim + 1, 0, self.start)
        after = grouped.narrow(dim + 1, self.stop, grouped.shape[dim + 1] - self.stop)
        return torch.cat((before, inner, after), dim + 1).flatten(dim, dim + 1)
