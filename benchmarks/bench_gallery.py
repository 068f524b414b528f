"""Every installed method on the demo's task: docstrings of Python's library, told apart by package.

A hundred steps on from a head fitted to the frozen MiniLM, each method as it comes: its own targets and its
own learning rate. Methods that need more than a stack's name are given below.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, machine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

import inlay
from inlay_train import demo
from inlay_train.compare import table
from inlay_train.compare.engine import Result, Row

PACKAGES = ("inlay-lora", "inlay-reparam", "inlay-orthogonal")
# Stacks for those whose defaults do not fit MiniLM (widths 384 and 1536).
SETTINGS = {"vblora": "vblora(vector_length=128)"}
STARTS = ("gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "lora_ga")
WITHIN = 0.03  # of LoRA's accuracy, else the method's page says why


def stacks(packages: Sequence[str], *, starts: bool) -> dict[str, str]:
    """Return what to train, by the name it is shown under."""
    origins = inlay.methods()
    names = [n for n, o in origins.items() if o.distribution in packages]
    found = {name: SETTINGS.get(name, name) for name in sorted(names)}
    return found | {f"lora from {start}": f"lora(start={start}())" for start in STARTS if starts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("bench-gallery"), help="where runs are kept")
    parser.add_argument("--packages", nargs="*", default=PACKAGES)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--starts", action="store_true", help="LoRA's starting points, too")
    given = parser.parse_args()
    wanted = stacks(given.packages, starts=given.starts)
    recipe = demo.Recipe(stacks=(demo.HEAD, *wanted.values()), processes=given.processes)
    console = Console(highlight=False, soft_wrap=True)
    given.work.mkdir(parents=True, exist_ok=True)
    learn, held = demo.texts(recipe, console)
    _, comparison = demo.baseline(given.work, learn, held, recipe, console)
    result = demo.compare_stacks(given.work, comparison, recipe, console)
    write(result, {stack: name for name, stack in wanted.items()})


def write(result: Result, names: dict[str, str]) -> None:
    """Leave the table and the chart in `results/`."""
    rows = table.ranked([row for row in result.rows if row.stack in names])
    lora = next(row.mean for row in rows if names[row.stack] == "lora")
    lines = ["# Every method on the demo's task", "", (__doc__ or "").partition("\n\n")[2].strip(), ""]
    lines += ["| method | accuracy | of LoRA's | trains | file | step |", "|---|---|---|---|---|---|"]
    for row in rows:
        beside, size = f"{100 * (row.mean - lora):+.1f}", table.size(row.file_bytes)
        lines.append(
            f"| `{names[row.stack]}` | {row.mean:.1%} | {beside} | {row.parameters:,} | {size} | "
            f"{1000 * row.step_seconds:.0f} ms |"
        )
    lines += [f"| `{names.get(s, s)}` | failed: {reason} | | | | |" for s, reason in result.failed.items()]
    (RESULTS / "gallery.md").write_text("\n".join(lines) + "\n")
    content: dict[str, Any] = {"benchmark": "gallery", "machine": machine(), "rows": []}
    for row in rows:
        content["rows"].append({"name": names[row.stack], **without_losses(row)})
    (RESULTS / "gallery.json").write_text(json.dumps(content, indent=1) + "\n")
    chart(rows, names)


def without_losses(row: Row) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(row).items() if k not in ("losses", "runs")}


def chart(rows: Sequence[Row], names: dict[str, str]) -> None:
    """Draw accuracy over trainable parameters and over the time of a step, each point named."""
    figure = Figure(figsize=(15, 9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for row in rows:
        for axes, x in ((left, row.parameters), (right, 1000 * row.step_seconds)):
            axes.plot(x, 100 * row.mean, "o", color="#0072B2", markersize=5)
            axes.annotate(names[row.stack], (x, 100 * row.mean), fontsize=7, xytext=(4, 3),
                          textcoords="offset points")  # fmt: skip
    left.set_xscale("log")
    left.set_xlabel("trainable parameters, the head's among them (logarithmic)")
    right.set_xlabel("a step, ms")
    left.set_ylabel("accuracy, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "gallery.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
