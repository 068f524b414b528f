"""What the processes of these tests run. Each appends a line to a file, so that runs can be counted."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from inlay import InlayError
from inlay_train.compare.store import Job, Outcome


def small(job: Job, folder: Path) -> Outcome:
    """Do what the stack's name says, then return an accuracy that is best at the rate 1."""
    with open(job.paths["log"], "a") as log:
        log.write(f"{job.stack} {job.seed} {job.rate:g} {os.getpid()}\n")
    if job.stack == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.stack == "refused":
        raise InlayError("this cannot be trained", saw="something\nor other", do="another thing")
    if job.stack == "broken":
        raise ValueError("a mistake in the program")
    if job.stack == "slow":
        time.sleep(600)
    value = 0.9 - abs(job.rate - 1) / 10 + job.seed / 100
    return Outcome(
        metric="accuracy", value=value, higher_is_better=True, parameters=10 * len(job.stack),
        base_parameters=1000, file_bytes=12_345, step_seconds=0.25, seconds=3.0 + len(job.stack),
        peak_bytes=10**9, merges="yes", steps=2, losses=[(1.0, 1.0), (2.0, 0.5)],
        values=[(2.0, value)],
    )  # fmt: skip
