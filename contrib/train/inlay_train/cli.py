"""The `inlay` command: registers the commands, and tells errors without a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

from inlay_train.commands.check import check
from inlay_train.commands.compare import compare
from inlay_train.commands.convert import convert
from inlay_train.commands.demo import demo
from inlay_train.commands.estimate import estimate
from inlay_train.commands.inspect import inspect
from inlay_train.commands.merge import merge
from inlay_train.commands.methods import methods
from inlay_train.commands.new import new
from inlay_train.commands.plan import plan
from inlay_train.commands.predict import predict
from inlay_train.commands.train import train

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Adapt a large model by a very small part of it."
)


def telling_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with inlay's errors printed (exit status 1) instead of raised."""

    @functools.wraps(command)
    def told(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            errors = sys.modules.get("inlay.errors")  # not imported: then it is none of ours
            if errors is None or not isinstance(error, errors.InlayError):
                raise
            from inlay_train import processes

            if processes.tells(error):
                typer.echo(error, err=True)
            raise typer.Exit(1) from error

    return told


for command in (methods, plan, estimate, train, predict, inspect, merge, convert, compare, demo, new, check):
    app.command()(telling_errors(command))
