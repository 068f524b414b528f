"""What is attached: per part its parameters, share, bytes, dtype, sites, and whether it merges."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from inlay.errors import CannotMerge
from inlay.hosts import base_size
from inlay.registry import registry
from inlay.stack import Placed, state_of


@dataclass(frozen=True)
class PartSummary:
    """One attached part."""

    path: str
    method: str
    sites: int
    parameters: int
    trainable: int
    bytes: int
    dtype: str
    mergeable: bool
    active: bool
    merged: bool


@dataclass(frozen=True)
class Summary:
    """Everything attached to a model."""

    parts: tuple[PartSummary, ...]
    base_parameters: int

    @property
    def trainable(self) -> int:
        return sum(p.trainable for p in self.parts)

    def __str__(self) -> str:
        lines = []
        for p in self.parts:
            state = "merged" if p.merged else "active" if p.active else "idle"
            merges = "merges" if p.mergeable else "does not merge"
            lines.append(
                f"{p.path}: {p.method}, {p.sites} sites, {p.parameters:,} parameters ({p.trainable:,} learn)"
                f", {p.bytes:,} bytes in {p.dtype}, {merges}, {state}"
            )
        share = 100 * self.trainable / max(1, self.base_parameters)
        lines.append(
            f"{self.trainable:,} of {self.base_parameters:,} base parameters' worth learn ({share:.3g} %)"
        )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Return what is attached to `model`; print it for a table."""
    state = state_of(model)
    placed = [] if state is None else list(state.placed.values())
    active = () if state is None else state.active
    return Summary(tuple(_summary(p, p.id in active) for p in placed), base_size(model))


def _summary(placed: Placed, active: bool) -> PartSummary:
    parameters = [p for _, p in placed.adapter.named_parameters()]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    return PartSummary(
        path=placed.path, method=placed.method.id, sites=len(placed.adapter.sites),
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        bytes=sum(p.numel() * p.element_size() for p in parameters), dtype=", ".join(dtypes),
        mergeable=mergeable(placed), active=active, merged=placed.merged,
    )  # fmt: skip


def mergeable(placed: Placed) -> bool:
    """Return whether the method gives folds for all of its sites."""
    try:
        registry.call("merge", placed.method, observed=False, adapter=placed.adapter)
    except CannotMerge:
        return False
    return True
