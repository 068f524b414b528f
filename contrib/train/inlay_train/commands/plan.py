"""`inlay plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from inlay.plan import Plan


def plan(
    model: Annotated[str, typer.Option(help="A model's folder, or the id of one downloaded before.")],
    method: Annotated[str, typer.Option(help='The stack, as in "lora(rank=8) + prefix_tuning(length=16)".')],
    task: Annotated[
        str | None, typer.Option(help="classification, causal-lm or seq2seq; default: the model's own class.")
    ] = None,
    train: Annotated[
        list[str] | None, typer.Option(help="Also train the base's own tensors there, as in --train head.")
    ] = None,
    labels: Annotated[int | None, typer.Option(min=1, help="Classes of a classification head.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where a stack would act and what it would cost. Reads the model's configuration, no weights."""
    import inlay
    from inlay_train.base import class_of, configuration, folder_of, skeleton
    from inlay_train.expression import check_installed

    check_installed(method)
    folder = folder_of(model)
    config = configuration(folder, **({} if labels is None else {"num_labels": labels}))
    kind = class_of(config, task, folder)
    found = inlay.plan(skeleton(kind, config), method, train=train or ())
    if as_json:
        typer.echo(json.dumps({"model": model, "architecture": kind.__name__, **_plain(found)}))
        return
    share = 100 * found.parameters / max(1, found.model_parameters)
    typer.echo(f"{kind.__name__}: {found.model_parameters:,} parameters")
    typer.echo(found)
    typer.echo(f"together: {found.parameters:,} parameters ({share:.3g} % of the base)")


def _plain(found: Plan) -> dict[str, Any]:
    return {
        "model_parameters": found.model_parameters,
        "parameters": found.parameters,
        "parts": [
            {"name": p.part.name, "method": p.part.method.id, "settings": p.part.method.to_dict(),
             "kinds": p.kinds, "sites": [site.name for site in p.sites], "parameters": p.parameters,
             "bytes": p.bytes}
            for p in found.parts
        ],
        "tied": found.tied,
    }  # fmt: skip
