"""`inlay merge`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that inlay.save wrote.")],
    model: Annotated[str, typer.Option(help="The base model's folder, or the id of one downloaded before.")],
    output: Annotated[Path, typer.Option(help="Folder for the merged model; new or empty.")],
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Merge although the base's weights are not those trained on.")
    ] = False,
    quantised: Annotated[
        str | None, typer.Option(help="How to merge into a quantised base: dequantise or requantise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fold a checkpoint into its base: a plain model folder, which transformers loads without inlay."""
    from inlay_train.merging import merged

    report = merged(folder, model, output, other_base=other_base, quantised=quantised)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(
        f"{report.output}: {report.architecture}, {' + '.join(report.parts)} folded in at "
        f"{report.sites} sites; largest measured error {report.worst_error:.1e} of the effect{report.cost}"
    )
