"""The process in which pytest runs for `inlay check`: `python -m inlay_train.check.child TASK.json`.

It ends when its standard input is closed: with the process that started it, however that ended.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest

from inlay_train.check.reporter import Reporter


def main(file: str) -> None:
    """Do what the task says. "ended" is told last: without it the process has crashed."""
    input = os.dup(sys.stdin.fileno())  # pytest puts another file in its place
    threading.Thread(target=_end_with_the_parent, args=(input,), daemon=True).start()
    task = json.loads(Path(file).read_text(encoding="utf-8"))
    reporter = Reporter(task)
    status, paths = 0, [*task["paths"], *files_of(task["modules"], reporter)]
    if paths:
        options = [
            "-c", task["settings"], "--rootdir", task["home"], "--confcutdir", task["confines"],
            "-p", "no:cacheprovider", "-p", "no:terminal", "--import-mode=importlib",
        ]  # fmt: skip
        status = int(pytest.main([*options, *paths], plugins=[reporter]))
    reporter.tell("ended", status=status)


def files_of(modules: list[str], reporter: Any) -> list[str]:
    """Return the files of modules; tell of those that cannot be imported."""
    found = []
    for name in modules:
        reporter.tell("collecting", where=name)
        try:
            found.append(str(importlib.import_module(name).__file__))
        except (Exception, SystemExit):
            reporter.tell("broken", where=name, text=traceback.format_exc(limit=-3))
    return found


def _end_with_the_parent(input: int) -> None:
    os.read(input, 1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # without waiting for what torch does on the way out
