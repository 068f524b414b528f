"""`inlay new`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def new(
    name: Annotated[str, typer.Argument(help="The method's name, as in my-method.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the package, new or empty.  [default: inlay-NAME]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a package with a working method, its conformance test, README and CI: the start of your own."""
    from inlay_train.scaffold.names import named
    from inlay_train.scaffold.write import create

    names = named(name)
    folder = Path(names.distribution) if output is None else output
    files = create(names, folder)
    steps = {
        f"cd {folder}": "",
        'pip install -e ".[test]"': "the package, pytest and hypothesis",
        "pytest": "every rule of the conformance kit",
        f"inlay check {names.distribution}": "the same, with a report",
        "python -m build": "a wheel (pip install build)",
        "twine upload dist/*": "publish it (pip install twine)",
    }
    if as_json:
        typer.echo(json.dumps({**names.plain(), "folder": str(folder), "files": files, "next": list(steps)}))
        return
    typer.echo(f"{folder}: the package {names.distribution} with the method {names.id} ({names.kind})")
    typer.echo("\n".join(f"  {file}" for file in files))
    typer.echo(f"\nThe method is in {names.package}/__init__.py. Next:")
    typer.echo("\n".join(f"  {step.ljust(34)}{what}".rstrip() for step, what in steps.items()))
