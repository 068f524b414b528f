"""Another process: a fresh interpreter, kept open, that loads checkpoints and computes with them.

It costs its start once per test run; each question builds its model anew.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import subprocess
import sys
from functools import cache
from typing import Any


@cache
def _process() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "inlay.testing.elsewhere"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_stop, process)
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    process.communicate()


def ask(**question: Any) -> dict[str, Any]:
    """Load `folder` onto a fresh model (`family`, `seed`, `dtype`) in the other process; return its answer.

    `modules` ({name: file}) are imported there first: they define methods that no installed package offers.
    It computes with as many threads as this process: sums are split among them, and round accordingly.
    """
    import torch

    process = _process()
    question["threads"] = torch.get_num_threads()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline() or '{"error": "the other process ended"}')
    return answer


def _import(name: str, file: str) -> None:
    """Import a module by name, or, a test file that has none, from where it lies."""
    if name in sys.modules:
        return
    try:
        importlib.import_module(name)
    except ImportError:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    import torch

    import inlay
    from inlay.testing.cases import tiny
    from inlay.testing.effects import output
    from inlay.testing.snapshots import digest

    torch.set_num_threads(question["threads"])
    for name, file in question["modules"].items():
        _import(name, file)
    model = tiny(question["family"], seed=question["seed"], dtype=getattr(torch, question["dtype"]))
    count = inlay.load(model, question["folder"], "elsewhere")
    return {"digest": digest({"logits": output(model)}), "tensors": count}


def main() -> None:
    """Answer questions, a line of JSON each, until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
