"""`inlay compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def compare(
    model: Annotated[str, typer.Option(help="A model's folder, or the id of one downloaded before.")],
    data: Annotated[Path, typer.Option(help="Rows to learn from: csv, tsv, jsonl or parquet.")],
    task: Annotated[str, typer.Option(help="classification, causal-lm or seq2seq.")],
    methods: Annotated[
        str, typer.Option(help='Stacks separated by ";", as in "head; lora(rank=8) + serial_adapter; full".')
    ],
    output: Annotated[Path, typer.Option(help="Folder for results; the same command goes on from there.")],
    test_data: Annotated[
        Path | None, typer.Option(help="Rows to measure on; default: a share of the data, held out.")
    ] = None,
    test_share: Annotated[float, typer.Option(min=0.01, max=0.9, help="That share.")] = 0.2,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each stack.")] = 3,
    budget: Annotated[
        int | None,
        typer.Option(min=1, help="Parameters of each stack: its rank, width or length is solved for."),
    ] = None,
    rates: Annotated[
        str,
        typer.Option(help="Multiples of the methods' own learning rates to choose from on training rows."),
    ] = "0.3 1 3",
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each; default: the cores, shared.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 16,
    by_length: Annotated[
        bool, typer.Option("--by-length", help="Texts of like length share a batch: less padding.")
    ] = False,
    text: Annotated[str, typer.Option(help="Column of texts.")] = "text",
    pair: Annotated[str | None, typer.Option(help="Column of second texts.")] = None,
    label: Annotated[str, typer.Option(help="Column of labels.")] = "label",
    target: Annotated[str | None, typer.Option(help="Column of what follows each text.")] = None,
    encoding: Annotated[str, typer.Option(help="Of csv, tsv and jsonl.")] = "utf-8",
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text that are read.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON, and nothing else.")
    ] = False,
) -> None:
    """Train several stacks on your data with several seeds; say which does best at what cost."""
    from inlay_train.compare.report import run

    values: dict[str, Any] = {
        "model": model, "data": data, "task": task, "test_data": test_data, "epochs": epochs, "steps": steps,
        "batch": batch, "by_length": by_length, "text": text, "pair": pair, "label": label, "target": target,
        "encoding": encoding, "max_length": max_length,
    }  # fmt: skip
    result = run(
        values, methods, output, seeds=seeds, budget=budget, rates=rates, processes=processes,
        threads=threads, test_share=test_share, quiet=as_json,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))
