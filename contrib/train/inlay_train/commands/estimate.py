"""`inlay estimate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def estimate(
    model: Annotated[
        str, typer.Option(help="A model's folder or config.json, or the id of one downloaded before.")
    ],
    method: Annotated[
        str, typer.Option(help='The stack, as "lora(rank=8) + prefix_tuning()"; "head" or "full".')
    ],
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    length: Annotated[int, typer.Option("--length", "--max-length", help="Tokens of each row.")] = 512,
    target_length: Annotated[
        int | None, typer.Option(help="Tokens of each target (seq2seq); default: as many.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="classification, causal-lm or seq2seq; default: the model's own class.")
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(help="Base tensors that learn too; none: none.  [default: head of a classifier]"),
    ] = None,
    labels: Annotated[int, typer.Option(help="Classes of a classification head.")] = 2,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16 (fp32, bf16).")] = "float32",
    quantize: Annotated[
        str | None, typer.Option(help="nf4, nf4-double (statistics quantised too), fp4 or int8: the base.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="4 or 8, as `inlay train` has it: nf4-double or int8.")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="adamw, sgd, adamw_8bit, paged_adamw or paged_adamw_8bit.")
    ] = "adamw",
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", "--gradient-checkpointing", help="Activations are computed twice."),
    ] = False,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    padded: Annotated[bool, typer.Option("--padded", help="Rows of unlike length: a mask is kept.")] = False,
    processes: Annotated[int, typer.Option(help="Devices, each with a batch of its own.")] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Weights, gradients and optimizer state sharded over them.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda: whose attention kernels are counted.")] = "cpu",
    memory: Annotated[
        str | None, typer.Option(help="Of a device, as 24GiB: say whether it fits and the largest batch.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what memory a training step needs, before any weight is loaded: counted on shapes alone."""
    from inlay_train.estimate import report, request, result

    wanted = request.Request(
        model=model, method=method, batch=batch, length=length, target_length=target_length, task=task,
        train=None if train is None else () if train == ["none"] else tuple(train), labels=labels,
        dtype=dtype, quantize=request.quantisation(quantize, bits), optimizer=optimizer,
        checkpointing=checkpointing, accumulate=accumulate, padded=padded, processes=processes, fsdp=fsdp,
        device=device,
    )  # fmt: skip
    found = result.estimate(wanted, None if memory is None else request.bytes_of(memory))
    typer.echo(json.dumps(found.plain) if as_json else "\n".join(report.lines(found)))
