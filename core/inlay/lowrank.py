"""Any change of linear layers as a LoRA: the best one of a rank, with its error stated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.attach import place, start
from inlay.differences import Difference, differences
from inlay.errors import ConfigError, shown
from inlay.plan import build_adapter
from inlay.registry import load_one
from inlay.stack import Placed, State

GROUP = "inlay.low_rank"  # where a package offers the method that holds factors
LINEAR = ("linear", "conv1d", "conv", "embedding")


@dataclass(frozen=True)
class LoweredSite:
    """What became of one site's ΔW: its rank, and ‖ΔW − B A‖ / ‖ΔW‖ of what was put in its place."""

    site: str
    rank: int
    error: float


@dataclass(frozen=True)
class LoweredReport:
    """What writing an adapter as a LoRA of `rank` has cost, site by site."""

    rank: int
    sites: tuple[LoweredSite, ...]

    @property
    def worst(self) -> float:
        return max(s.error for s in self.sites)

    def __str__(self) -> str:
        return (
            f"rank {self.rank} at {len(self.sites)} sites; ranks of the changes up to "
            f"{max(s.rank for s in self.sites)}; largest error {self.worst:.1e} of the change"
        )


def to_lora(
    model: nn.Module, source: str, *, name: str, rank: int | None = None, activate: bool = False
) -> LoweredReport:
    """Attach a LoRA called `name` that does what the adapter `source` does, as well as `rank` allows.

    B A is the best approximation of each ΔW in the Frobenius norm (truncated SVD), exact up to
    rounding where ΔW is of that rank already; without `rank` each site takes the rank of its own ΔW.
    Scaling is 1; changes of biases become biases of B. Needs the package inlay-lora.

    Raises `ConfigError`, the model untouched, where `source` has no weight form, changes norms, or
    changes nothing.
    """
    state = start(model, name, "to_lora")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ConfigError("this cannot be a rank", saw=f"rank={shown(rank)}", do="give a positive integer")
    placed, report = low_rank(state, name, list(differences(state.find(source)).values()), rank)
    place(state, [placed], activate=activate, trainable=False)
    return report


def low_rank(
    state: State, name: str, found: Sequence[Difference], rank: int | None
) -> tuple[Placed, LoweredReport]:
    """Return a LoRA of these differences as an adapter's only part, and what it has cost."""
    _check(found)
    holder = load_one(GROUP, "holder of low-rank changes", "factors")
    factored = [Factors.of(d, rank) for d in found]
    ranks = {d.site.name: max(1, len(f.down)) for d, f in zip(found, factored, strict=True)}
    method = holder.method(ranks, biased=any(d.bias is not None for d in found))
    adapter = build_adapter(state.model, method, tuple(d.site for d in found), path=f"{name}/{method.id}")
    for difference, factors, (_, delta) in zip(found, factored, adapter.placed, strict=True):
        holder.fill(delta, factors.down, factors.up, difference.bias)
    sites = tuple(LoweredSite(d.site.name, f.rank, f.error) for d, f in zip(found, factored, strict=True))
    placed = Placed(state.next_id, name, method.id, method, adapter)
    return placed, LoweredReport(max(ranks.values()), sites)


@dataclass(frozen=True)
class Factors:
    """B (out, r) and A (r, in), the best of rank r for a ΔW of rank `rank`, and the error they leave."""

    down: Tensor
    up: Tensor
    rank: int
    error: float

    @classmethod
    def of(cls, difference: Difference, most: int | None) -> Factors:
        """Factor one difference; of a rank of its own if `most` is None."""
        change = difference.weight
        change = change.T if difference.site.kind == "embedding" else change.flatten(1)
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        floor = s[0] * max(change.shape) * torch.finfo(torch.float32).eps / 8
        rank = int((s > floor).sum())
        kept = rank if most is None else min(rank, most)
        root = s[:kept].sqrt()
        error = float(s[kept:].norm() / s.norm()) if rank else 0.0
        return cls(root[:, None] * v[:kept], u[:, :kept] * root, rank, error)


def _check(found: Sequence[Difference]) -> None:
    """Raise unless a LoRA can hold these differences."""
    odd = [
        d for d in found if d.site.kind not in LINEAR or (d.site.kind == "embedding" and d.bias is not None)
    ]
    if odd:
        raise ConfigError(
            "low rank cannot hold every change of this adapter",
            saw=f"{odd[0].site.name} is a {odd[0].site.kind} ({len(odd)} of {len(found)} sites)",
            do="leave those out of its targets, or make full-size differences: inlay.combine(...)",
        )
    if not any(bool(d.weight.any()) or d.bias is not None for d in found):
        raise ConfigError(
            "there is no change to write in low rank",
            saw=f"{len(found)} sites, every ΔW 0",
            do="train the adapter first",
        )
