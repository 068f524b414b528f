"""One run of `inlay compare`: `inlay train`, measured on the rows that this run is there for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inlay_train.compare import measure
from inlay_train.compare.store import Job, Outcome
from inlay_train.config import make
from inlay_train.figures import Result
from inlay_train.run import train


def run(job: Job, folder: Path) -> Outcome:
    """Train in `folder`, and return the figures; of what was trained, only the last step's adapter stays."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    result = train(make(**values(job, folder)))
    manifest = folder / "inlay.json"  # everything was trained where there is none
    parts = [p["name"] for p in json.loads(manifest.read_bytes())["parts"]] if manifest.exists() else []
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if job.choosing:
        shutil.rmtree(folder)
    return outcome(result, parts)


def values(job: Job, folder: Path) -> dict[str, Any]:
    """Return the run's settings; a rate is chosen on rows held out of those to learn from."""
    own = {**job.settings["config"], **(job.settings["choice"] if job.choosing else {})}
    evaluated = {} if job.choosing else {"eval_data": job.paths["test"]}
    return {
        **own, **evaluated, "model": job.paths["model"], "data": job.paths["learn"], "output": folder,
        "method": job.stack, "seed": job.seed, "rate": job.rate, "best": False, "keep": 1,
    }  # fmt: skip


def outcome(result: Result, parts: Sequence[str]) -> Outcome:
    """Return a run's figures as a comparison keeps them."""
    return Outcome(
        metric=result.metric, value=result.value, higher_is_better=result.higher_is_better,
        parameters=result.parameters, base_parameters=result.base_parameters, file_bytes=result.file_bytes,
        step_seconds=result.step_seconds, seconds=result.seconds, peak_bytes=result.peak_bytes,
        merges=measure.merges(parts, result.mergeable), steps=result.steps, losses=result.losses,
        values=[(e["step"], e[result.metric]) for e in result.evaluations],
    )  # fmt: skip
