"""The figures of a comparison as words, for the terminal, the page and programs."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from inlay_train.compare.engine import Result, Row

COLUMNS = ("stack", "trains", "of the model", "file", "step", "training", "peak memory", "merges", "rate")
TERMINAL = 18  # characters of a stack, beside the figures in 80 columns


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, best first; of equals the one that trains less."""
    return sorted(rows, key=lambda row: (-row.mean if row.higher_is_better else row.mean, row.parameters))


def cells(row: Row) -> list[str]:
    """Return what stands in the columns after the metric, and before it the stack."""
    return [
        row.stack, f"{row.parameters:,}", percent(row.share), size(row.file_bytes),
        seconds(row.step_seconds), seconds(row.seconds), size(row.peak_bytes), row.merges,
        "" if row.rate is None else f"×{row.rate:g}",
    ]  # fmt: skip


def measured(row: Row) -> str:
    """Return "96.1 % ± 0.3 (3 seeds)" in the metric's own unit."""
    unit = " %" if is_share(row.metric) else ""
    spread = "" if row.spread is None else f" ± {number(row.spread, row.metric)}"
    seeds = f"{len(row.values)} seed{'s' if len(row.values) > 1 else ''}"
    return f"{number(row.mean, row.metric)}{unit}{spread} ({seeds})"


def is_share(metric: str) -> bool:
    return metric in ("accuracy", "f1")


def percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def number(value: float, metric: str) -> str:
    return f"{100 * value:.1f}" if is_share(metric) else f"{value:.3g}"


def size(count: float) -> str:
    """Return bytes as people read them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B" if count else "–"


def seconds(value: float) -> str:
    if value >= 100:
        return f"{value / 60:.1f} min"
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms" if value else "–"


def terminal(result: Result, title: str) -> Table:
    """Return what fits into 80 columns of the table, as rich prints it; the best row in bold."""
    rows = ranked(result.rows)
    seeds = max(len(row.values) for row in rows)
    spread = f", {seeds} seeds: mean ± standard deviation" if seeds > 1 else ", 1 seed"
    metric = f"{rows[0].metric}{' in %' if is_share(rows[0].metric) else ''}"
    table = Table(title=f"{title}\n{metric}{spread}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("stack", overflow="fold")
    for name in (rows[0].metric, "trains", "share", "file", "step", "memory", "merges"):
        table.add_column(name, no_wrap=True, justify="right")
    names = brief([row.stack for row in rows], TERMINAL)
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        around = "" if row.spread is None else f" ± {number(row.spread, row.metric)}"
        table.add_row(
            Text(name), f"{number(row.mean, row.metric)}{around}", count(row.parameters),
            percent(row.share), size(row.file_bytes), seconds(row.step_seconds), size(row.peak_bytes),
            "partly" if row.merges.endswith(" only") else row.merges, style="" if place else "bold",
        )  # fmt: skip
    for stack in result.failed:
        table.add_row(Text(stack), "failed", style="red")
    return table


def brief(stacks: Sequence[str], most: int) -> list[str]:
    """Return each stack in at most about `most` characters: without settings, where that tells them apart."""
    bare = [re.sub(r"\([^()]*\)", "", stack) for stack in stacks]
    return [
        stack if len(stack) <= most or bare.count(short) > 1 else short
        for stack, short in zip(stacks, bare, strict=True)
    ]


def count(number: int) -> str:
    """Return a number of parameters in at most five characters."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)


def notes(result: Result) -> list[str]:
    """Return what a reader must know to read the table right."""
    said = [
        "training: seconds of all steps, evaluation left out; step: the median. Peak memory is of the whole "
        "process, model and libraries included. File: what is saved; the head is in it."
    ]
    for row in result.rows:
        if len(row.tried) > 1 and row.rate is not None:
            rates = [float(rate) for rate in row.tried]
            tried = ", ".join(f"×{k}: {number(v, row.metric)}" for k, v in row.tried.items())
            edge = " — the edge of what was tried" if row.rate in (min(rates), max(rates)) else ""
            said.append(f"{row.stack}: rates tried on held-out training rows: {tried}{edge}")
        if row.trained != row.stack:
            said.append(f"{row.stack}: trained as {row.trained}")
        said += [f"{row.stack}: a run failed and is left out: {reason}" for reason in row.failed]
    return said


def machine(threads: int, processes: int) -> str:
    """Say what the figures depend on, and nothing that says whose machine it was.

    Where the load is above the runs at a time, other programs took part of the time measured.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load average {os.getloadavg()[2]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{cores} cores ({platform.machine()}){load}, {processes} runs at a time, {threads} thread(s) each; "
        f"Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}, inlay {version('inlay')}"
    )


def data(result: Result) -> dict[str, Any]:
    """Return everything as plain data, best first."""
    rows = [{**asdict(row), "mean": row.mean, "spread": row.spread} for row in ranked(result.rows)]
    return {"rows": rows, "failed": result.failed}
