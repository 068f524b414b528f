"""What `import inlay` costs beside `import torch`, and with one attach on a Linear.

Goals: `import inlay` ≤ 1.1 × `import torch`, and with the attach ≤ 1.2 ×. Each figure is the median
of fresh processes, run in turn so that a busy machine burdens all alike; the ratio of processor times
is printed beside it. Bytecode is compiled by a first run that is not counted, as it is for every
installed package.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

from common import report, spread

ROUNDS = 11
BEFORE = "import time; start, busy = time.perf_counter(), time.process_time()\n"
AFTER = "\nprint(time.perf_counter() - start, time.process_time() - busy)"
SCRIPTS = {
    "import torch": "import torch",
    "import inlay": "import inlay",
    "import inlay, attach": (
        "import inlay, torch\n"
        "from inlay.authoring import Trained\n"
        'inlay.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), Trained(targets=["0"]))'
    ),
}
GOALS = {"import torch": 1.0, "import inlay": 1.1, "import inlay, attach": 1.2}


def run(script: str, cache: str) -> tuple[float, float]:
    """Return the seconds `script` says it took in a process of its own: on the clock, and processor time."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = cache
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + script + AFTER],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    wall, busy = done.stdout.split()
    return float(wall), float(busy)


def main() -> None:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SCRIPTS}
    with tempfile.TemporaryDirectory() as cache:
        for script in SCRIPTS.values():
            run(script, cache)
        for _ in range(ROUNDS):
            for name, script in SCRIPTS.items():
                times[name].append(run(script, cache))
    rows: list[dict[str, Any]] = []
    for name, values in times.items():
        wall, busy = spread([w for w, _ in values]), spread([b for _, b in values])
        rows.append({"case": name, "seconds": wall["median"], "min": wall["min"], "max": wall["max"],
                     "processor": busy["median"]})  # fmt: skip
    for row in rows:
        ratio = row["seconds"] / rows[0]["seconds"]
        row |= {"ratio": ratio, "processor ratio": row["processor"] / rows[0]["processor"]}
        row |= {"goal": GOALS[row["case"]], "kept": ratio <= GOALS[row["case"]]}
    report("import", rows, rounds=ROUNDS)


if __name__ == "__main__":
    main()
