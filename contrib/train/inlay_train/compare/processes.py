"""Jobs in processes of their own, several at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from inlay_train.compare.store import Job, Outcome, Store

TICK = 0.05
Told = Callable[[Job, Outcome | str], None]


def run_all(jobs: Sequence[Job], store: Store, *, processes: int, threads: int, done: Told) -> dict[str, str]:
    """Run the jobs that have no result yet; call `done(job, outcome or why not)` after each.

    Each process gets `threads` threads. Returns, by digest, why runs failed. However this ends, no process
    outlives it.
    """
    waiting, running, failed = [], [], {}
    for job in {job.digest: job for job in jobs}.values():
        known = store.get(job)
        waiting += [job] if known is None else []
        if known is not None:
            done(job, known)
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                running.append((job, start(job, store, threads)))
            time.sleep(TICK)
            for job, process in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((job, process))
                close(process)
                outcome = store.get(job)
                if outcome is None:
                    failed[job.digest] = why(process.returncode, store.log(job))
                done(job, failed[job.digest] if outcome is None else outcome)
    finally:
        for _, process in running:
            process.kill()
            process.wait()
            close(process)
    return failed


def start(job: Job, store: Store, threads: int) -> subprocess.Popen[str]:
    """Start the process of one run. Its own session: Ctrl-C reaches this process only, which then ends it."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                   "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    with open(store.log(job), "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "inlay_train.compare.worker"],
            stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it ended before it read anything; its exit status and log say why
        process.stdin.write(json.dumps({"job": asdict(job), "folder": str(store.home)}) + "\n")
        process.stdin.flush()
    return process


def close(process: subprocess.Popen[str]) -> None:
    """Close our end of its input."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()


def why(status: int, log: Path) -> str:
    """Say why a run has no result: the signal that ended it, or the last of what it said."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    said = log.read_text(errors="replace").strip()
    beats = said.rfind("\n  saw: ")
    if beats >= 0:  # one of inlay's errors: its first line tells
        return said[:beats].splitlines()[-1]
    return said.splitlines()[-1] if said else f"ended with status {status}, saying nothing"
