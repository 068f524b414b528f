"""`inlay demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the adapter and the figures.")] = Path(
        "demo-output"
    ),
    all: Annotated[
        bool, typer.Option("--all", help="Compare every installed method, and LoRA beside a prefix too.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    validation: Annotated[
        bool, typer.Option("--validation", help="Measure on part of the training texts: to choose settings.")
    ] = False,
) -> None:
    """Compare stacks on a real encoder and real text; load, merge and check the best (5 minutes)."""
    from inlay_train.demo import STACKS, Recipe, every_stack, run

    run(output, Recipe(stacks=every_stack() if all else STACKS, seed=seed, validation=validation))
