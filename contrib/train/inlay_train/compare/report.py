"""`inlay compare` from its options to its files: figures, table, pictures, page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from inlay import InlayError
from inlay_train.compare import charts, engine, page, table
from inlay_train.compare.progress import shown_on
from inlay_train.compare.setup import comparison


def run(
    values: Mapping[str, Any],
    methods: str,
    output: Path,
    *,
    seeds: int = 3,
    budget: int | None = None,
    rates: str = "0.3 1 3",
    processes: int = 1,
    threads: int | None = None,
    test_share: float = 0.2,
    choice: Mapping[str, Any] | None = None,
    title: str = "Stacks compared",
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare, write everything to `output`, and return it as plain data; say what goes on unless `quiet`."""
    console = Console(highlight=False, quiet=quiet)
    if output.exists() and not output.is_dir():
        raise InlayError("the output is not a folder", saw=f"{output}", do="choose another --output")
    wanted = comparison(
        values, methods, output, seeds=seeds, budget=budget, rates=parsed(rates), test_share=test_share,
        choice=choice,
    )  # fmt: skip
    threads = threads or max(1, (os.cpu_count() or 1) // processes)
    try:
        with shown_on(console) as (done, phase):
            result = engine.compare(
                wanted, output, processes=processes, threads=threads, done=done, phase=phase
            )
    except KeyboardInterrupt:
        console.print(f"stopped; what was measured is kept in {output}: the same command goes on from there")
        raise
    machine = table.machine(threads, processes)
    about = description(wanted)
    content = {"title": title, "about": about, "machine": machine, **table.data(result)}
    written = write(result, content, output)
    console.print(table.terminal(result, title))
    console.print(
        f"{written}  everything, to look at in a browser; its pictures and comparison.json beside it"
    )
    return content


def write(result: engine.Result, content: Mapping[str, Any], output: Path) -> Path:
    """Write comparison.json, the pictures and the page; return the page's path."""
    (output / "comparison.json").write_text(json.dumps(content, indent=1) + "\n")
    pictures = charts.draw(table.ranked(result.rows), content["machine"])
    charts.save(pictures, output)
    text = page.page(
        result, pictures, title=content["title"], about=content["about"], machine=content["machine"]
    )  # fmt: skip
    return page.save(text, output)


def description(wanted: engine.Comparison) -> str:
    """Say what was trained on what."""
    config = wanted.settings["config"]
    length = f"{config['steps']} steps" if "steps" in config else f"{config['epochs']:g} epochs"
    seeds = f"{wanted.seeds} seed{'s' if wanted.seeds > 1 else ''}"
    rates = ", ".join(f"×{rate:g}" for rate in wanted.rates) + " of the methods' own"
    chosen = f"learning rates chosen among {rates} by runs on four fifths of the training rows"
    return (
        f"{config['task']}, {Path(wanted.paths['model']).name}: {length} of {config['batch']} rows a step, "
        f"{seeds}; {chosen if len(wanted.rates) > 1 else f'learning rates {rates}'}. Measured after the last "
        "step, on rows that nothing was learnt from or chosen by."
    )


def parsed(rates: str) -> tuple[float, ...]:
    """Return the multiples in a text such as "0.3 1 3"."""
    try:
        values = tuple(dict.fromkeys(float(rate) for rate in rates.replace(",", " ").split()))
    except ValueError:
        values = ()
    if not values or not all(0 < value < math.inf for value in values):
        raise InlayError(
            "these cannot be multiples of a learning rate",
            saw=f"--rates {rates!r}",
            do='give some, as in "0.3 1 3"',
        )
    return values
