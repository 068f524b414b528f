"""`inlay convert`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

GROUP = "inlay.bridges"


def convert(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint to convert.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the result; new or empty.")],
    base: Annotated[str, typer.Option(help="The base model's folder, or its config.json.")],
    source: Annotated[str | None, typer.Option("--from", help="The format of DIR: peft.")] = None,
    target: Annotated[str | None, typer.Option("--to", help="The format of OUT: peft.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert a checkpoint from or to another library's format, exactly or not at all."""
    from inlay_train.refusal import refusal

    if (source is None) == (target is None):
        raise refusal(
            "one of the two formats is inlay's own",
            saw=f"--from {source} --to {target}",
            do="give --from peft, or --to peft",
        )
    bridge = bridge_to(source or target or "")
    report = (bridge.write if source is None else bridge.read)(folder, output, base)
    typer.echo(json.dumps(asdict(report)) if as_json else f"{output}: {report}")


def bridge_to(name: str) -> Any:
    """Return what converts from and to another library's folders, as an installed package offers it."""
    from importlib.metadata import entry_points

    from inlay_train.refusal import refusal

    offered = {point.name: point for point in entry_points(group=GROUP)}
    if name not in offered:
        raise refusal(
            "no installed package converts this format",
            saw=f"{name!a}; installed: {', '.join(sorted(offered)) or 'none'}",
            do="pip install inlay-peft-bridge" if name == "peft" else "give --from peft, or --to peft",
        )
    return offered[name].load()
