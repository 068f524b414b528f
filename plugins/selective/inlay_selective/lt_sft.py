"""LT-SFT: every entry learns first, then only those that moved most, from the start again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from inlay.authoring import Adapter, Compact, ConfigError, Init, Method, Site, Stage, hookimpl, setting
from inlay.authoring.sparse import Entries, Place, checked, distinct, largest, place_each, places

ENDED = "ended"  # how many stages have ended


@dataclass(frozen=True)
class LTSFT(Method):
    """Lottery-ticket sparse fine-tuning: a full run finds the entries, a second one trains them alone.

        θ' = θ + δ,   δ = 0 at the start and again after the first stage, then zero but for K entries

    Stage "full 1" trains every entry of the targets; at its end (`inlay.advance`) the K of largest |δ|
    over all targets are kept, ties going to the first, and what the stage learned is undone. Stage
    "sparse 1" trains these. With `rounds` n each keeps K/n more, and begins where the last one ended.
    K is `count`, or `density` times the entries. Loss + penalty·Σ|δ| / N, N the base's size.

    Parameters: the targets' in a full stage, K in the end. arXiv 2110.07560,
    cambridgeltl/composable-sft. Differs: the head is a part of its own, `train=("head",)`, which is
    neither put back nor in the penalty; θ is whatever acts below, so a task's δ is one to its language's.
    """

    id: ClassVar[str] = "lt_sft"
    paper: ClassVar[str] = "2110.07560"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding"})
    default_targets: ClassVar[tuple[str, ...]] = ("embedding", "linear")
    lr: ClassVar[float] = 5e-4
    weight_decay: ClassVar[float | None] = 0.0

    count: int | None = setting(None, least=1)
    density: float = setting(0.01, above=0, most=1)
    rounds: int = setting(1, least=1)
    penalty: float = setting(0.0, least=0)

    def kept(self, sites: Sequence[Site], ended: int) -> int:
        """Return how many entries are kept once the full stage that follows `ended` stages has ended."""
        entries = sum(math.prod(place.shape) for place in distinct(places(sites)))
        count = self.count or round(self.density * entries)
        if not self.rounds <= count <= entries:
            raise ConfigError(
                "lt_sft: so many entries cannot be kept",
                saw=f"{count:,} of {entries:,}, in {self.rounds} rounds",
                do="give a count that is neither above all entries nor below the rounds, or a density",
            )
        return count * (ended // 2 + 1) // self.rounds

    @staticmethod
    @hookimpl
    def inject(method: LTSFT, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        ended = adapter.data.get(ENDED, 0)
        method.kept(sites, ended)

        def entries(place: Place, init: Init) -> Entries:
            whole = None if ended % 2 else init.zeros(*place.shape)
            if (indices := adapter.calibration.get(place.label)) is None:
                return Entries(whole=whole)
            checked(indices, math.prod(place.shape), place.label)
            return Entries(init.zeros(len(indices)), indices, whole)

        place_each(adapter, sites, entries)
        return len(sites)

    @staticmethod
    @hookimpl
    def trainable_mask(method: LTSFT, adapter: Adapter) -> dict[str, bool]:  # type: ignore[override]
        full = adapter.data.get(ENDED, 0) % 2 == 0
        return {name: name.endswith(".whole") == full for name, _ in adapter.named_parameters()}

    @staticmethod
    @hookimpl
    def stages(method: LTSFT, adapter: Adapter) -> list[Stage]:
        names = [f"{kind} {number + 1}" for number in range(method.rounds) for kind in ("full", "sparse")]
        ends = [partial(end, method)] * (len(names) - 1) + [None]
        return [Stage(name, finish=finish) for name, finish in zip(names, ends)][adapter.data.get(ENDED, 0) :]

    @staticmethod
    @hookimpl
    def auxiliary_loss(method: LTSFT, adapter: Adapter) -> Tensor | None:
        if not method.penalty:
            return None
        changes = [change for _, e in _tensors(adapter).items() if (change := e()) is not None]
        moved = [(c.values if isinstance(c, Compact) else c).abs().sum() for c in changes]
        return method.penalty / adapter.base_size * torch.stack(moved).sum()


def end(method: LTSFT, adapter: Adapter) -> None:
    """End a stage: keep the entries that moved most, or let all of them learn again."""
    ended, tensors = adapter.data.get(ENDED, 0), _tensors(adapter)
    if ended % 2:
        for place in distinct(places(adapter.sites)):
            tensors[place.label].widen(adapter.init(place.site).zeros(*place.shape))
    else:
        before = sum(map(len, adapter.calibration.values()))
        count = method.kept(adapter.sites, ended) - before
        chosen = largest({name: entries.moved() for name, entries in tensors.items()}, count)
        for name, entries in tensors.items():
            entries.keep(chosen.get(name))
        adapter.calibration = {n: e.indices for n, e in tensors.items() if e.indices is not None}
    adapter.data[ENDED] = ended + 1


def _tensors(adapter: Adapter) -> dict[str, Entries]:
    """Return the change of each tensor by its first label."""
    return {f"{n}.{kind}": e for n, delta in adapter.modules() for kind, e in delta.named_children()}
