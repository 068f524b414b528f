"""`inlay demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the adapter and the figures.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    validation: Annotated[
        bool, typer.Option("--validation", help="Measure on part of the training texts: to choose settings.")
    ] = False,
) -> None:
    """Train LoRA and a prefix on a real encoder and real text; save, load, merge, check (3 minutes)."""
    from inlay_train.demo import Recipe, run

    run(output, Recipe(seed=seed, validation=validation))
