"""`inlay predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of `inlay train`.")],
    data: Annotated[Path, typer.Option(help="csv, tsv, jsonl or parquet file with the columns of text.")],
    model: Annotated[
        str | None, typer.Option(help="The base model, where it is no longer where it was.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="csv, tsv or jsonl file to write.  [default: print]")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of text files.")] = "utf-8",
    batch: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Label texts, or write on from them, with what `inlay train` trained."""
    from inlay_train.predict import Predictor, write

    predictor = Predictor(folder, model)
    rows = predictor.rows(data, encoding=encoding, batch=batch, new=max_new_tokens)
    if output is not None:
        write(rows, output)
        typer.echo(f"{len(rows):,} rows in {output}", err=as_json)
    elif as_json:
        typer.echo("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        typer.echo("\n".join("\t".join(str(value) for value in row.values()) for row in rows))
