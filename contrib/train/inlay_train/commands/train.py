"""`inlay train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Text = str | None
File = Path | None
Whole = int | None
Number = float | None


def train(
    config: Annotated[File, typer.Argument(help="YAML file with any of these settings; options win.")] = None,
    model: Annotated[Text, typer.Option(help="Folder of the base model, or its hub id.")] = None,
    data: Annotated[File, typer.Option(help="csv, tsv, jsonl or parquet file with named columns.")] = None,
    task: Annotated[Text, typer.Option(help="classification, causal-lm or seq2seq.")] = None,
    method: Annotated[
        Text, typer.Option(help='The stack, as "lora(rank=8) + ia3()"; "head" or "full" to compare with.')
    ] = None,
    output: Annotated[File, typer.Option(help="Folder for the adapter, checkpoints and figures.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder.")
    ] = False,
    eval_data: Annotated[
        File, typer.Option(help="Rows that choose the best step, instead of held-out ones.")
    ] = None,
    test_data: Annotated[File, typer.Option(help="Rows measured once at the end.")] = None,
    held_out: Annotated[Number, typer.Option(help="Share of the rows to hold out.  [default: 0.1]")] = None,
    split_seed: Annotated[Whole, typer.Option(help="Seed of the held-out rows.  [default: 0]")] = None,
    encoding: Annotated[Text, typer.Option(help="Encoding of text files.  [default: utf-8]")] = None,
    text: Annotated[Text, typer.Option(help="Column of texts.  [default: text]")] = None,
    pair: Annotated[Text, typer.Option(help="Column of second texts (classification).")] = None,
    label: Annotated[Text, typer.Option(help="Column of labels.  [default: label]")] = None,
    target: Annotated[Text, typer.Option(help="Column of what to write (causal-lm, seq2seq).")] = None,
    max_length: Annotated[
        Whole, typer.Option(help="Tokens read of a text.  [default: the model's, up to 512]")
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(help="Base tensors that learn too; none: none.  [default: head of a classifier]"),
    ] = None,
    epochs: Annotated[Number, typer.Option(help="Passes over the data.  [default: 3]")] = None,
    steps: Annotated[Whole, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch: Annotated[Whole, typer.Option(help="Rows of a batch, in each process.  [default: 16]")] = None,
    accumulate: Annotated[Whole, typer.Option(help="Batches of a step.  [default: 1]")] = None,
    by_length: Annotated[
        bool | None, typer.Option(help="Texts of like length share a batch: less padding.")
    ] = None,
    eval_batch: Annotated[Whole, typer.Option(help="Rows of a batch in evaluation.  [default: 64]")] = None,
    lr: Annotated[Number, typer.Option(help="Learning rate, instead of each method's own.")] = None,
    rate: Annotated[Number, typer.Option(help="Factor of all learning rates.  [default: 1]")] = None,
    weight_decay: Annotated[Number, typer.Option(help="Where a method sets none.  [default: 0]")] = None,
    warmup: Annotated[
        Number, typer.Option(help="Share of the steps in which rates rise.  [default: 0.1]")
    ] = None,
    schedule: Annotated[Text, typer.Option(help="linear, cosine or constant.  [default: linear]")] = None,
    max_norm: Annotated[
        Number, typer.Option(help="Gradients are clipped to it; 0: not.  [default: 1]")
    ] = None,
    seed: Annotated[Whole, typer.Option(help="Seed of everything else.  [default: 0]")] = None,
    evaluate_every: Annotated[
        Whole, typer.Option(help="Steps between evaluations, each with a checkpoint.")
    ] = None,
    best: Annotated[bool | None, typer.Option(help="End with the best step evaluated, or the last.")] = None,
    keep: Annotated[Whole, typer.Option(help="Checkpoints kept.  [default: 2]")] = None,
    dtype: Annotated[
        Text, typer.Option(help="Of the base: float32, bfloat16 or float16.  [default: float32]")
    ] = None,
    adapter_dtype: Annotated[Text, typer.Option(help="Of what learns.  [default: the base's]")] = None,
    master_weights: Annotated[
        bool | None, typer.Option(help="Steps on float32 copies of what learns in 16 bits.")
    ] = None,
    mixed_precision: Annotated[
        Text, typer.Option(help="bf16 or fp16: autocast; fp16 with a scaled loss, on a GPU.")
    ] = None,
    bits: Annotated[Whole, typer.Option(help="4 or 8: the base quantised by bitsandbytes.")] = None,
    double_quant: Annotated[
        bool | None, typer.Option(help="Of 4 bits: the blocks' scales in 8 bits too.  [default: with 4 bits]")
    ] = None,
    compute_dtype: Annotated[
        Text,
        typer.Option(help="Of layers in 4 bits: float32 or bfloat16.  [default: as --dtype]"),
    ] = None,
    optimizer: Annotated[
        Text, typer.Option(help="adamw, adamw_8bit, paged_adamw or paged_adamw_8bit.  [default: adamw]")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Save memory by computing activations twice.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Train a stack on your data: evaluated on held-out rows, resumable, with a learning curve."""
    given = {k: v for k, v in locals().items() if v is not None and k not in ("config", "resume", "as_json")}
    if train == ["none"]:
        given["train"] = []
    _run(config, given, resume=resume, as_json=as_json)


def _run(file: Path | None, given: dict[str, Any], *, resume: bool, as_json: bool) -> None:
    from inlay_train import processes

    processes.join()
    try:
        _trained(file, given, resume=resume, as_json=as_json)
    finally:
        processes.leave()


def _trained(file: Path | None, given: dict[str, Any], *, resume: bool, as_json: bool) -> None:
    from rich.console import Console

    from inlay_train import processes, run
    from inlay_train.prepare import configured
    from inlay_train.watch import Stopped

    main = processes.is_main()
    console = Console(stderr=as_json, highlight=False, soft_wrap=True, quiet=not main)
    prepared = processes.together(lambda: configured(given, file, resume=resume))
    try:
        result = run.train(prepared.config, resume=resume, console=console, prepared=prepared)
    except (Stopped, KeyboardInterrupt) as stop:
        saved = f"saved after step {stop.step}" if isinstance(stop, Stopped) else "stopped without saving"
        if main:
            typer.echo(
                f"{saved}; go on with: inlay train --output {prepared.config.output} --resume", err=True
            )
        raise typer.Exit(128 + stop.signal if isinstance(stop, Stopped) else 130) from stop
    if main and as_json:
        typer.echo(json.dumps(result.plain))
    elif main:
        console.print("\n".join(run.told(result)), markup=False)
