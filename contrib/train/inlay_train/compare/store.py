"""What a comparison runs, what came of it, and where that is kept: one JSON file for each run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inlay import InlayError
from inlay_train import folder


@dataclass(frozen=True)
class Job:
    """One training run: a stack, a seed, a learning rate, and everything else that its result depends on.

    `rate` multiplies the learning rates of the methods. `choosing` runs measure on a part of the training
    rows, held out to choose that rate. `settings` is plain data for `runner` ("module:function");
    `paths` say where things lie, and are the only part that the result does not depend on.
    """

    stack: str
    seed: int
    rate: float
    choosing: bool
    runner: str
    settings: Mapping[str, Any]
    paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Return the name of this run: equal exactly where the result must be."""
        content = {k: v for k, v in asdict(self).items() if k != "paths"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def __str__(self) -> str:
        return f"{self.stack}, {f'trying rate ×{self.rate:g}' if self.choosing else f'seed {self.seed}'}"


@dataclass
class Outcome:
    """What one run measured. `losses` and `values` are (step, number) pairs along the way."""

    metric: str
    value: float
    higher_is_better: bool
    parameters: int  # that learnt
    base_parameters: int
    file_bytes: int
    step_seconds: float
    seconds: float
    peak_bytes: int
    merges: str  # "yes", "no", or the parts that do
    steps: int
    losses: list[tuple[float, float]] = field(default_factory=list)
    values: list[tuple[float, float]] = field(default_factory=list)

    @property
    def goodness(self) -> float:
        """The value, larger being better."""
        return self.value if self.higher_is_better else -self.value


class Store:
    """The folder of a comparison: `runs/` holds results, `logs/` what each run said."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.runs, self.logs, self.kept = home / "runs", home / "logs", home / "adapters"
        for made in (self.runs, self.logs):
            made.mkdir(parents=True, exist_ok=True)

    def path(self, job: Job) -> Path:
        return self.runs / f"{job.digest}.json"

    def log(self, job: Job) -> Path:
        return self.logs / f"{job.digest}.txt"

    def adapter(self, job: Job) -> Path:
        """Return the folder for what this run saves."""
        return self.kept / job.digest

    def get(self, job: Job) -> Outcome | None:
        """Return what `job` measured in an earlier run, or None."""
        path = self.path(job)
        if not path.exists():
            return None
        try:
            return Outcome(**json.loads(path.read_text())["outcome"])
        except (ValueError, TypeError, KeyError) as error:
            raise InlayError(
                "a result of an earlier run cannot be read",
                saw=f"{path}: {type(error).__name__}: {str(error)[:100]}",
                do="delete that file; the run is then made again",
            ) from error

    def put(self, job: Job, outcome: Outcome) -> None:
        """Keep what `job` measured: complete on disk, or not there at all."""
        content = {"job": {k: v for k, v in asdict(job).items() if k != "paths"}, "outcome": asdict(outcome)}
        folder.write(self.path(job), json.dumps(content, indent=1))
