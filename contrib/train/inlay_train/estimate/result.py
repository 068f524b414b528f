"""What was counted, per device, in words and as plain data; and the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from inlay_train.estimate.request import Read, Request, read
from inlay_train.estimate.step import Counted

MOST = 2**20  # rows of a batch
TOLD = {
    "base": "weights of the base", "adapters": "weights of the adapters", "gradients": "gradients",
    "optimizer": "optimizer state", "activations": "activations",
    "temporary": "temporary, in backward and step",
    "gathered": "gathered by FSDP", "buckets": "gradients again, in DDP's buckets",
    "batch": "batch", "other": "other",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Bytes of one kind on one device: when all together are most, and when this kind is."""

    kind: str
    at_peak: int
    most: int


@dataclass(frozen=True)
class Estimate:
    """What one training step needs on each device."""

    request: Request
    architecture: str
    task: str
    parameters: int  # of the base
    parts: Sequence[tuple[str, int]]
    learning: int
    lines: Sequence[Line]
    kept: int  # activations at the end of the forward pass
    paged: int  # optimizer state outside the device
    where: str
    memory: int | None = None
    largest_batch: int | None = None

    @property
    def total(self) -> int:
        return sum(line.at_peak for line in self.lines)

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.total <= self.memory

    @property
    def plain(self) -> dict[str, Any]:
        """The estimate as JSON types; all figures are bytes of one device, but for counts of parameters."""
        return {
            **asdict(self.request), "architecture": self.architecture, "task": self.task,
            "parameters": {"base": self.parameters, **dict(self.parts)}, "learning": self.learning,
            "at_peak": {line.kind: line.at_peak for line in self.lines},
            "most": {line.kind: line.most for line in self.lines},
            "kept_for_backward": self.kept, "paged": self.paged, "total": self.total, "peak_in": self.where,
            "memory": self.memory, "fits": self.fits, "largest_batch": self.largest_batch,
        }  # fmt: skip


def estimate(request: Request, memory: int | None = None) -> Estimate:
    """Return what a step of this kind needs; with `memory`, also whether it fits and which batch does."""
    found = read(request)
    made = counted(request, found)
    if memory is None:
        return made

    def total(batch: int) -> int:
        return counted(replace(request, batch=batch), found).total

    return replace(made, memory=memory, largest_batch=largest(total, memory, {request.batch: made.total}))


def counted(request: Request, found: Read) -> Estimate:
    """Return what one step needs, counted."""
    step = Counted(request, found).run()
    ledger = step.ledger
    lines = []
    for kind in TOLD:
        share = ledger.shares.get(kind, 1.0)
        line = Line(kind, round(ledger.at_peak[kind] * share), round(ledger.most[kind] * share))
        if line.most or kind in ("base", "adapters", "gradients", "optimizer"):
            lines.append(line)
    return Estimate(
        request, found.kind.__name__, found.task, found.parameters, tuple(step.parts), step.learning, lines,
        step.kept, ledger.most["paged"], ledger.where,
    )  # fmt: skip


def largest(total: Callable[[int], int], memory: int, known: dict[int, int]) -> int:
    """Return the largest batch with total(batch) ≤ memory, 0 if there is none.

    `known` holds totals already there. The total rises nearly straight, so each guess is taken from the
    line through what is known on both sides.
    """
    known = dict(known)
    known.setdefault(1, total(1))
    if known[1] > memory:
        return 0
    while True:
        low = max(batch for batch, size in known.items() if size <= memory)
        high = min((batch for batch, size in known.items() if size > memory), default=None)
        if low >= MOST or high == low + 1:
            return low
        guess = _guess(known, memory, low, high)
        known[guess] = total(guess)


def _guess(known: dict[int, int], memory: int, low: int, high: int | None) -> int:
    """Return a batch above `low` and below `high`, if there is one, where the line reaches `memory`."""
    other = high if high is not None else max((b for b in known if b < low), default=None)
    if other is None:
        return 2 * low
    slope = (known[other] - known[low]) / (other - low)
    step = int((memory - known[low]) / slope) if slope > 0 else low
    return min(max(low + max(1, step), low + 1), MOST if high is None else high - 1)
