"""`inlay inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from inlay_train.checkpoints import Needed, Saved, SavedPart


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that inlay.save wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint holds, for which base, and which packages it needs."""
    from inlay_train.checkpoints import read

    saved = read(folder)
    typer.echo(json.dumps(saved.plain()) if as_json else "\n".join(_lines(saved)))


def _lines(saved: Saved) -> list[str]:
    from inlay_train.known import columns, printable

    parameters = sum(part.parameters for part in saved.parts)
    size = sum(part.bytes for part in saved.parts)
    head = ("part", "method", "package", "here", "sites", "parameters", "settings")
    lines = [
        f"{saved.folder}: {parameters:,} parameters, {size:,} bytes",
        f"digest      {saved.digest}",
        f"base        {saved.base['architecture']} (shapes {saved.base['shapes']})",
        f"written by  {', '.join(f'{name} {version}' for name, version in saved.versions.items())}",
    ]
    lines = [printable(line)[:200] for line in lines]
    lines += ["", *columns([head, *(_row(part) for part in saved.parts)])]
    if saved.missing:
        lines += ["", "not installed here:", *(f"  {_advice(needed)}" for needed in saved.missing)]
    return lines


def _row(part: SavedPart) -> tuple[str, ...]:
    first = part.needs[0]
    settings = ", ".join(f"{k}={v}" for k, v in part.settings.items() if v is not None)
    return (part.name[:60], part.method[:60], f"{first.package} {first.version}"[:60],
            first.installed or "not installed", f"{len(part.sites):,}", f"{part.parameters:,}",
            settings[:300])  # fmt: skip


def _advice(needed: Needed) -> str:
    from inlay_train.known import known, printable

    trust = "" if needed.method in known() else " (if you trust it: the checkpoint names it)"
    command = needed.install + trust if needed.install else "the checkpoint does not say which package has it"
    return f"{printable(needed.method)[:100]}: {command}"
