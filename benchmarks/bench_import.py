"""What `import inlay` costs beside `import torch`, and with one attach on a Linear.

Goals: `import inlay` ≤ 1.1 × `import torch`, and with the attach ≤ 1.2 ×. Each figure is the median
of fresh processes, run in turn so that a busy machine burdens all alike. Bytecode is compiled by a
first run that is not counted, as it is for every installed package.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from common import report, spread

ROUNDS = 11
BEFORE = "import time; start = time.perf_counter()\n"
AFTER = "\nprint(time.perf_counter() - start)"
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


def run(script: str, cache: str) -> float:
    """Return the seconds `script` says it took in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = cache
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + script + AFTER],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in SCRIPTS}
    with tempfile.TemporaryDirectory() as cache:
        for script in SCRIPTS.values():
            run(script, cache)
        for _ in range(ROUNDS):
            for name, script in SCRIPTS.items():
                times[name].append(run(script, cache))
    base = spread(times["import torch"])["median"]
    rows = []
    for name, values in times.items():
        found = spread(values)
        ratio = found["median"] / base
        rows.append({"case": name, "seconds": found["median"], "min": found["min"], "max": found["max"],
                     "ratio": ratio, "goal": GOALS[name], "kept": ratio <= GOALS[name]})  # fmt: skip
    report("import", rows, rounds=ROUNDS)


if __name__ == "__main__":
    main()
