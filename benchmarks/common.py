"""What all benchmarks share: timing, and writing a table and its JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """Return what a figure depends on and nothing that says whose machine it was."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Return how long `action` takes, once: on the clock, and of this thread's processor time."""
    start, busy = time.perf_counter(), time.thread_time()
    action()
    return time.perf_counter() - start, time.thread_time() - busy


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and most of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(name: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Print `rows` as a table and write them, with the machine's facts, to `results/<name>.json`."""
    columns = list(rows[0])
    cells = [columns, *([_cell(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    RESULTS.mkdir(exist_ok=True)
    content = {"benchmark": name, "machine": machine(), "rows": list(rows), **more}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
