"""`inlay methods`. Without other options than `--json`, `__main__` answers it before typer is imported."""

from __future__ import annotations

from typing import Annotated

import typer

from inlay_train.known import listing


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods that are installed, and what would install the others."""
    typer.echo(listing(as_json=as_json))
