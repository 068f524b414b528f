"""A check from its options to its report and files."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from inlay_train.check import engine, junit, report
from inlay_train.check.outcome import Outcome
from inlay_train.check.target import Target, resolve
from inlay_train.refusal import refusal

NEEDED = ("pytest", "hypothesis", "transformers")
MOST = 4  # processes, where nothing else is asked for


def check(
    text: str, *, rules: str | None, long: bool, as_json: bool, junit_file: Path | None, jobs: int | None
) -> bool:
    """Check what `text` names, tell and write the results; return whether all is well."""
    _check_installed()
    numbers, target = _rules(rules), resolve(text)
    console = Console(stderr=as_json, highlight=False)
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = jobs or min(MOST, cores)
    profile = "long" if long else os.environ.get("INLAY_HYPOTHESIS", "quick")
    with TemporaryDirectory(prefix="inlay-check-") as home, report.progress_on(console) as heard:
        gathered = engine.run(target, Path(home), rules=numbers, profile=profile, jobs=processes, heard=heard)
    outcome = Outcome(target, gathered, profile, processes, time.monotonic() - started)
    _check_found(target, gathered)
    if as_json:
        print(json.dumps(outcome.plain()))
    else:
        report.tell(outcome, console)
    if junit_file is not None:
        junit.write(outcome, junit_file)
    return outcome.good


def _check_installed() -> None:
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise refusal(
            "the conformance kit needs packages that are not installed",
            saw=f"no {', '.join(absent)}",
            do='pip install "inlay[testing]"',
        )


def _rules(text: str | None) -> list[str]:
    numbers = [] if text is None else [n.strip().upper() for n in text.split(",")]
    if wrong := [n for n in numbers if not re.fullmatch(r"R\d\d", n)]:
        raise refusal("a rule cannot be read", saw=ascii(wrong[0])[:200], do="write --rules R01,R09")
    return numbers


def _check_found(target: Target, gathered: engine.Gathered) -> None:
    if gathered.unknown:
        raise refusal(
            f"there is no rule {', '.join(sorted(gathered.unknown))}",
            saw=f"--rules for {target.name}",
            do="see docs/conformance.md for the rules there are",
        )
    if not gathered.classes and not gathered.broken:
        raise refusal(
            "there is no conformance class",
            saw=f"no subclass of MethodConformance in {target.name}",
            do="name a file that has some, or an installed package, for whose methods they are derived",
        )
