"""Orders of rows that put texts of like length into one batch, the same whenever an epoch begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

NEIGHBOURS = 50  # batches that are sorted together


class ByLength(Sampler[int]):
    """Shuffled rows, sorted by length among 50 batches; the batches shuffled, the one not full last.

    transformers' own sampler draws from the state of the moment, so that a resumed epoch has
    another order; this one draws from seed and epoch.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        full = len(order) - len(order) % self.batch
        batches: list[list[int]] = []
        for start in range(0, full, NEIGHBOURS * self.batch):
            near = sorted(
                order[start : min(full, start + NEIGHBOURS * self.batch)], key=lambda i: self.lengths[i]
            )
            batches += [near[i : i + self.batch] for i in range(0, len(near), self.batch)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[i]
        yield from order[full:]


def lengths(dataset: Any) -> list[int]:
    """Return how many tokens each row of a dataset has."""
    known = getattr(dataset, "lengths", None)
    return known if known is not None else [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
