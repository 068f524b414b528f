"""`inlay methods`."""

from __future__ import annotations

from importlib.metadata import entry_points


def methods() -> None:
    """List the installed methods, from package metadata alone."""
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "package", "version", box=None)
    for entry in sorted(entry_points(group="inlay.methods")):
        table.add_row(
            entry.name, entry.dist.name if entry.dist else "", entry.dist.version if entry.dist else ""
        )
    Console().print(table)
