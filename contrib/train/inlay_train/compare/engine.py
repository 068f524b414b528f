"""A comparison: learning rates chosen on held-out training rows, then every stack with every seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from inlay import InlayError
from inlay_train.compare.processes import Told, run_all
from inlay_train.compare.store import Job, Outcome, Store

OWN = 1.0  # times the methods' own learning rates


@dataclass(frozen=True)
class Comparison:
    """What is compared. `stacks` maps what the user wrote to what is trained (sizes solved for a budget).

    `rates` are tried for each stack but those `without_rate`, which are fitted to the end.
    """

    stacks: Mapping[str, str]
    runner: str
    settings: Mapping[str, Any]
    seeds: int = 3
    rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    paths: Mapping[str, str] = field(default_factory=dict)
    without_rate: tuple[str, ...] = ()

    def job(self, written: str, seed: int, rate: float, *, choosing: bool = False) -> Job:
        return Job(self.stacks[written], seed, rate, choosing, self.runner, self.settings, self.paths)

    def choices(self) -> list[Job]:
        """Return the runs that choose learning rates: none where there is nothing to choose from."""
        if len(self.rates) < 2:
            return []
        learning = [written for written in self.stacks if written not in self.without_rate]
        return [self.job(w, 0, rate, choosing=True) for w in learning for rate in self.rates]

    def results(self, chosen: Mapping[str, float]) -> list[Job]:
        """Return the runs whose results are compared, seed by seed: a first table is there early."""
        return [self.job(w, seed, rate) for seed in range(self.seeds) for w, rate in chosen.items()]


@dataclass
class Row:
    """One stack's figures over its seeds; medians where nothing else is said."""

    stack: str
    trained: str
    rate: float | None
    metric: str
    values: list[float]
    higher_is_better: bool
    parameters: int
    share: float
    file_bytes: int
    step_seconds: float
    seconds: float
    peak_bytes: int
    merges: str
    steps: int
    losses: list[tuple[float, float]]
    curve: list[tuple[float, float]]
    tried: dict[str, float]
    failed: list[str]
    runs: list[str]  # one for each value: the folder in `adapters/`

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds (n - 1); None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass
class Result:
    """All rows, and what stacks failed altogether, with the reason."""

    rows: list[Row]
    failed: dict[str, str]


def compare(
    comparison: Comparison,
    folder: Path,
    *,
    processes: int = 1,
    threads: int = 1,
    done: Told = lambda job, outcome: None,
    phase: Callable[[str, int], None] = lambda name, runs: None,
) -> Result:
    """Run what has no result in `folder` yet, and return the figures of all.

    Raises `InlayError` if another process compares into `folder`, or if no run succeeded.
    """
    store = Store(folder)
    try:
        with FileLock(folder / "compare.lock", timeout=0):
            return _compare(comparison, store, processes, threads, done, phase)
    except Timeout as error:
        raise InlayError(
            "another run is writing to this folder",
            saw=f"{folder / 'compare.lock'} is held",
            do="wait for it to end, or give another --output",
        ) from error


def _compare(
    comparison: Comparison,
    store: Store,
    processes: int,
    threads: int,
    done: Told,
    phase: Callable[[str, int], None],
) -> Result:
    choices = comparison.choices()
    phase("choosing learning rates", len(choices))
    failed = run_all(choices, store, processes=processes, threads=threads, done=done)
    chosen, tried = {}, {}
    for written in comparison.stacks:
        chosen[written], tried[written] = choose(comparison, written, store)
    jobs = comparison.results(chosen)
    phase("comparing", len(jobs))
    failed |= run_all(jobs, store, processes=processes, threads=threads, done=done)
    return _gathered(comparison, chosen, tried, failed, store)


def _gathered(
    comparison: Comparison,
    chosen: Mapping[str, float],
    tried: Mapping[str, dict[str, float]],
    failed: Mapping[str, str],
    store: Store,
) -> Result:
    """Return the rows of the stacks that have a result, and why the others have none."""
    rows, lost = [], {}
    for written, rate in chosen.items():
        mine = [comparison.job(written, seed, rate) for seed in range(comparison.seeds)]
        outcomes = {job.digest: found for job in mine if (found := store.get(job)) is not None}
        reasons = [failed[job.digest] for job in mine if job.digest in failed]
        if outcomes:
            rows.append(row(comparison, written, rate, outcomes, tried[written], reasons))
        else:
            lost[written] = reasons[0]
    if not rows:
        raise InlayError(
            "no run of this comparison came to an end",
            saw="; ".join(f"{stack}: {reason}" for stack, reason in lost.items()),
            do=f"see what they said in {store.logs}; the same command tries again",
        )
    return Result(rows, lost)


def choose(comparison: Comparison, written: str, store: Store) -> tuple[float, dict[str, float]]:
    """Return the rate with the best value on the held-out training rows, and the value of each.

    Of equals the one nearest to the method's own; a rate at which the run failed is none.
    """
    tried = {}
    for job in comparison.choices():
        if job.stack == comparison.stacks[written] and (outcome := store.get(job)) is not None:
            tried[job.rate] = outcome
    if not tried:
        return OWN, {}
    best = max(tried, key=lambda rate: (tried[rate].goodness, -max(rate, 1 / rate)))
    return best, {f"{rate:g}": outcome.value for rate, outcome in tried.items()}


def row(
    comparison: Comparison,
    written: str,
    rate: float,
    measured: Mapping[str, Outcome],
    tried: dict[str, float],
    failed: list[str],
) -> Row:
    """Return the figures of one stack, from those of its runs."""
    outcomes = list(measured.values())
    first = outcomes[0]

    def middle(name: str) -> float:
        return statistics.median(getattr(outcome, name) for outcome in outcomes)

    return Row(
        stack=written, trained=comparison.stacks[written],
        rate=None if written in comparison.without_rate else rate,
        metric=first.metric, values=[o.value for o in outcomes], higher_is_better=first.higher_is_better,
        parameters=first.parameters, share=first.parameters / max(1, first.base_parameters),
        file_bytes=first.file_bytes, step_seconds=middle("step_seconds"), seconds=middle("seconds"),
        peak_bytes=round(middle("peak_bytes")), merges=first.merges, steps=first.steps,
        losses=average([o.losses for o in outcomes]), curve=average([o.values for o in outcomes]),
        tried=tried, failed=failed, runs=list(measured),
    )  # fmt: skip


def average(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """Return the mean curve over seeds, at the steps that all of them have."""
    known = [{float(step): value for step, value in curve} for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in known)))
    return [(step, statistics.fmean(curve[step] for curve in known)) for step in steps]
