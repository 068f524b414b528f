"""The `inlay` command."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Adapt a large model by a very small part."
)


@app.command()
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
    from inlay import InlayError
    from inlay_train.demo import Recipe, run

    try:
        run(output, Recipe(seed=seed, validation=validation))
    except InlayError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error


@app.command()
def methods() -> None:
    """List the installed methods, from package metadata alone."""
    table = Table("method", "package", "version", box=None)
    for entry in sorted(entry_points(group="inlay.methods")):
        table.add_row(
            entry.name, entry.dist.name if entry.dist else "", entry.dist.version if entry.dist else ""
        )
    Console().print(table)
