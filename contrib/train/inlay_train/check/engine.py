"""Runs the kit's processes, and gathers what they tell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay_train.check.target import Target

TICK = 0.1
CRASHES = 3  # after so many no further process is started
LINES = 10  # of a log
FATAL = "Fatal Python error"
PYTESTS_OWN = (3, 4)  # its exit status after an internal error, or where it cannot begin
DERIVED = """\
from inlay_train.check.derive import conformance_of

kind = conformance_of({name!r})
globals()[kind.__name__] = kind
"""
Event = dict[str, Any]
Heard = Callable[[Event], None]


@dataclass
class Gathered:
    """What the processes told: the rules and classes there are, the tests and their results.

    `broken` says by place what could not be imported at all.
    """

    rules: dict[str, dict[str, str]] = field(default_factory=dict)
    classes: dict[str, dict[str, Any]] = field(default_factory=dict)
    items: dict[str, Event] = field(default_factory=dict)
    results: list[Event] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)  # rules asked for that there are not

    def take(self, event: Event) -> None:
        match event["event"]:
            case "collected":
                new = event["classes"].keys() - self.classes.keys()
                self.rules |= event["rules"]
                self.classes |= event["classes"]
                self.items |= {item["id"]: item for item in event["items"]}
                self.results += [skipped for skipped in event["skipped"] if skipped["class"] in new]
                self.unknown |= set(event["unknown"])
            case "broken":
                self.broken[event["where"]] = event["text"]
            case "result":
                self.results.append({**self.items[event["id"]], **event})

    @property
    def waiting(self) -> set[str]:
        return self.items.keys() - {result.get("id") for result in self.results}

    @property
    def methods(self) -> set[str]:
        return {described["method"] for described in self.classes.values()}


class Worker:
    """One process, what it told and what it is doing."""

    def __init__(self, home: Path, task: dict[str, Any], number: int) -> None:
        self.events, self.log = home / f"events-{number}.jsonl", home / f"log-{number}.txt"
        self.running, self.collecting, self.ended, self.status = "", "", False, 0
        file = home / f"task-{number}.json"
        own = {"events": str(self.events), "number": number % task["processes"]}
        file.write_text(json.dumps(task | own), encoding="utf-8")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "inlay_train.check.child", str(file)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=task["environment"],
                start_new_session=True,
            )  # fmt: skip
        self._read = 0

    def heard(self) -> Iterator[Event]:
        """Yield what it told since the last call."""
        if not self.events.exists():
            return
        with self.events.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # half written
                    break
                self._read += len(line)
                event = json.loads(line)
                self.running = event["id"] if event["event"] == "started" else ""
                if event["event"] == "collecting":
                    self.collecting = event["where"]
                if event["event"] == "ended":
                    self.ended, self.status = True, event["status"]
                yield event

    def why(self) -> str:
        """Say how a process that crashed ended, and the last it said."""
        status = self.process.returncode
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return "\n".join([f"the process ended {how}", *self.last()])

    def last(self) -> list[str]:
        """Return the last lines it said; of a crash in compiled code, the innermost calls."""
        said, fatal, calls = self.log.read_text(errors="replace").partition(FATAL)
        return (fatal + calls).splitlines()[:LINES] if fatal else said.strip().splitlines()[-LINES:]

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def run(
    target: Target, home: Path, *, rules: Sequence[str], profile: str, jobs: int, heard: Heard
) -> Gathered:
    """Run the conformance classes of `target`; then, for its methods without one, derived classes."""
    gathered = Gathered()

    def note(event: Event) -> None:
        gathered.take(event)
        heard(event)

    asked = {"rules": list(rules), "methods": list(target.methods), "quick": profile == "quick",
             "environment": _environment(home, profile)}  # fmt: skip
    if target.paths or target.modules:
        place = _folder(home / "declared")
        confines = _confines(target.paths[0]) if target.paths else place
        task = {"paths": list(target.paths), "modules": list(target.modules), "confines": str(confines)}
        _run_all(place, asked | task, jobs, gathered, note)
    missing = set() if gathered.broken else set(target.methods) - gathered.methods
    if missing:
        place = _folder(home / "derived")
        task = {"paths": _derived(place, sorted(missing)), "modules": [], "confines": str(place)}
        _run_all(place, asked | task, jobs, gathered, note)
    return gathered


def _confines(path: str) -> Path:
    """Return the folder outside of which no conftest.py counts."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _folder(path: Path) -> Path:
    (path / "claims").mkdir(parents=True)
    (path / "pytest.ini").write_text("[pytest]\n")
    return path


def _derived(home: Path, methods: Sequence[str]) -> list[str]:
    """Write a test file for each method: if one cannot be imported, the others can."""
    paths = [home / f"derived_for_{name}.py" for name in methods]
    for path, name in zip(paths, methods, strict=True):
        path.write_text(DERIVED.format(name=name), encoding="utf-8")
    return [str(path) for path in paths]


def _environment(home: Path, profile: str) -> dict[str, str]:
    """Return the processes' environment: one thread each, no plugins of pytest but its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    return {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **kept, "TOKENIZERS_PARALLELISM": "false",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "INLAY_HYPOTHESIS": profile,
            "HYPOTHESIS_STORAGE_DIRECTORY": str(home / "hypothesis")}  # fmt: skip


def _run_all(home: Path, task: dict[str, Any], jobs: int, gathered: Gathered, note: Heard) -> None:
    """Run one set of tests in `jobs` processes; start another one where one crashed. None outlives this."""
    task |= {"home": str(home), "settings": str(home / "pytest.ini"), "claims": str(home / "claims"),
             "processes": jobs}  # fmt: skip
    workers = [Worker(home, task, number) for number in range(jobs)]
    running, crashes = list(workers), 0
    try:
        while running:
            time.sleep(TICK)
            ended = [worker for worker in running if worker.process.poll() is not None]
            for worker in running:
                for event in worker.heard():
                    note(event)
            for worker in ended:
                running.remove(worker)
                crashes += not worker.ended
                went_on = _told_last(worker, note)
                left = gathered.waiting - {other.running for other in running}
                if went_on and left and crashes < CRASHES:
                    workers.append(Worker(home, task, len(workers)))
                    running.append(workers[-1])
    finally:
        for worker in workers:
            worker.stop()
    for item in sorted(gathered.waiting):
        note(
            _failed(item, f"it was not run: {crashes} processes had crashed" if crashes else "it was not run")
        )


def _told_last(worker: Worker, note: Heard) -> bool:
    """Note how a process ended; return whether it crashed in a test, so that others may still run."""
    if not worker.ended:
        if worker.running:
            note(_failed(worker.running, worker.why()))
            return True
        note({"event": "broken", "where": worker.collecting, "text": worker.why()})
    elif worker.status in PYTESTS_OWN:
        note({"event": "broken", "where": "pytest", "text": "\n".join(worker.last())})
    return False


def _failed(item: str, saw: str) -> Event:
    return {"event": "result", "id": item, "outcome": "failed", "reason": "", "seconds": 0.0,
            "found": {"saw": saw, "example": "", "at": ""}}  # fmt: skip
