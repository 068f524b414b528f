"""What a run found out: its figures, as data and as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """The figures of a run. Shares lie between 0 and 1; `losses` and `evaluations` follow the steps."""

    task: str
    method: str
    metric: str
    higher_is_better: bool
    value: float  # of the metric, on the rows that chose the best step
    metrics: dict[str, float]
    test: dict[str, float]  # empty without --test-data
    parameters: int  # that learn
    base_parameters: int
    steps: int
    best_step: int  # the one the result is of; the last unless the best was asked for
    seconds: float  # of all steps, evaluation left out
    step_seconds: float  # median
    peak_bytes: int
    file_bytes: int
    learnt_from: int
    evaluated_on: int
    truncated: float  # share of the texts
    mergeable: list[str]
    output: str
    labels: list[str] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """What learns, as a share of the base's parameters."""
        return self.parameters / max(1, self.base_parameters)

    @property
    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def losses(history: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, mean loss since the one before) from a Trainer's log."""
    return [(logs["step"], logs["loss"]) for logs in history if "loss" in logs]


def evaluations(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the metrics of each evaluation with its step, from a Trainer's log."""
    found = [logs for logs in history if any(key.startswith("eval_") for key in logs)]
    return [{"step": logs["step"], **metrics(logs, "eval")} for logs in found]


def metrics(logs: dict[str, Any], prefix: str) -> dict[str, float]:
    """Return what was measured under a prefix, without how long it took."""
    named = {key.removeprefix(f"{prefix}_"): v for key, v in logs.items() if key.startswith(f"{prefix}_")}
    return {key: v for key, v in named.items() if key != "runtime" and not key.endswith("_per_second")}


def peak_bytes() -> int:
    """Return the most memory this process ever held at once, the GPU's where there is one; 0 if unknown."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def draw(result: Result, path: Path) -> None:
    """Write the learning curve as a PNG: loss by step, the metric of each evaluation beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.add_subplot()
    left.plot(*zip(*result.losses), color="tab:gray", label="training loss")
    left.set(xlabel="step", ylabel="loss", title=f"{result.method}\n{result.metric} {result.value:.4g}")
    right = left.twinx()
    points = [(e["step"], e[result.metric]) for e in result.evaluations if result.metric in e]
    right.plot(*zip(*points), color="tab:blue", marker="o", label=result.metric)
    right.set_ylabel(result.metric, color="tab:blue")
    FigureCanvasAgg(figure).print_png(str(path))
