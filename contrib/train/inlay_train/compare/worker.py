"""One run in a process of its own: a crash, or memory running out, ends this run alone.

Reads a job, as JSON, from the first line of standard input, and ends when that is closed: with the
process that started it, however that ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import import_module
from pathlib import Path

from inlay import InlayError
from inlay_train.compare.store import Job, Store


def main() -> int:
    """Run the job and keep its result; an error of the user's making is told without a traceback."""
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    job, store = Job(**given["job"]), Store(Path(given["folder"]))
    module, function = job.runner.split(":")
    try:
        store.put(job, getattr(import_module(module), function)(job, store.adapter(job)))
    except InlayError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    # Threads of torch may still run: leaving without waiting for them is what is wanted here.
    code = main()
    sys.stderr.flush()
    os._exit(code)
