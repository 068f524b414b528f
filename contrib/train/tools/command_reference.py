"""Write docs/commands.md from the program itself. Run it after changing a command."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer

from inlay_train.cli import app

FILE = Path(__file__).resolve().parents[3] / "docs" / "commands.md"
HEAD = """\
# Commands

`pip install inlay-train` brings the command `inlay` (also `python -m inlay_train`). Errors go to
standard error, with exit status 1, or 2 where the command line itself is wrong. With `--json`,
standard output holds JSON and nothing else.

This page is made from the program by `contrib/train/tools/command_reference.py`.
"""


def text() -> str:
    """Return the page: a section per command, in the program's order."""
    group: Any = typer.main.get_command(app)
    return "\n".join([HEAD, *(_section(name, command) for name, command in group.commands.items())])


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join([
        "inlay", name, *(_in_usage(p, _shown(p)) for p in arguments),
        *(f"{p.opts[0]} {_kind(p)}" for p in options if p.required), "[OPTIONS]",
    ])  # fmt: skip
    rows = [_row(f"`{_shown(p)}`", p) for p in arguments]
    rows += [_row(f"`{_flags(p)}`", p) for p in options]
    table = ["| | | default |", "|---|---|---|", *rows] if rows else []
    head = [f"## inlay {name}", "", inspect.cleandoc(command.help or ""), ""]
    return "\n".join([*head, "```text", usage, "```", "", *table, ""])


def _shown(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _in_usage(argument: Any, shown: str) -> str:
    return shown if argument.required else f"[{shown}]"


def _flags(option: Any) -> str:
    names = "/".join([option.opts[0], *option.secondary_opts])
    return names if option.is_flag else f"{names} {_kind(option)}"


def _kind(option: Any) -> str:
    """Return what stands after an option: the name of its type, as in TEXT."""
    names = {"str": "TEXT", "int": "N", "float": "X", "Path": "PATH"}
    written = str(option.type_descriptor.annotation)
    return next((shown for kind, shown in names.items() if kind in written), "VALUE")


def _row(what: str, parameter: Any) -> str:
    said = (parameter.help or "").replace("|", "\\|")
    said, _, told = said.partition("[default: ")  # where the program fills in what is None here
    if "list" in str(parameter.type_descriptor.annotation):
        said = f"{said.strip()} May be repeated."
    default = told.rstrip("]") or _default(parameter)
    return f"| {what} | {said.strip()} | {default} |"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value is None or value is False or value == [] else str(value)


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
