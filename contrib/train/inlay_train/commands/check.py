"""`inlay check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(
    target: Annotated[
        str, typer.Argument(help="An installed package, module or method; or a test file or folder.")
    ],
    rules: Annotated[
        str | None, typer.Option(help="Only these rules, as in R01,R09.  [default: all]")
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", help="Many random examples instead of few fixed ones.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    junit: Annotated[Path | None, typer.Option(help="JUnit file to write too.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes at a time.  [default: a core each, at most 4]")
    ] = None,
) -> None:
    """Hold a package's methods to the rules of the conformance kit, and say which they keep."""
    from inlay_train.check.command import check as run

    good = run(target, rules=rules, long=long, as_json=as_json, junit_file=junit, jobs=jobs)
    if not good:
        raise typer.Exit(1)
