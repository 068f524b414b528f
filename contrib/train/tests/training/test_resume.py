"""A run that is killed and resumed ends with the same weights, bit for bit, as one that is not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS, EVERY = 24, 3
METHOD = "dylora(rank=4, dropout=0.1) + prefix_tuning(length=2)"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def start(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Return a function that starts a run of `inlay train` in a process of its own."""
    data = tmp_path_factory.mktemp("data") / "data.csv"
    words = ["bright", "calm", "fine", "glad", "bleak", "cold", "dull", "grim"]
    rows = [(f"{words[i % 8]} and {words[(i * 3) % 8]}", "good" if i % 8 < 4 else "bad") for i in range(60)]
    data.write_text("text,label\n" + "\n".join(",".join(row) for row in rows) + "\n")

    def begin(output: Path, *more: str) -> subprocess.Popen[str]:
        settings = {
            "model": models["bert"], "data": data, "task": "classification", "method": METHOD,
            "output": output, "steps": STEPS, "evaluate-every": EVERY, "batch": 8, "keep": 3,
        }  # fmt: skip
        options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return subprocess.Popen(
            [sys.executable, "-m", "inlay_train", "train", *options, *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return begin


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    run = start(output)
    told, _ = run.communicate(timeout=300)
    assert run.returncode == 0, told
    return output


def same(one: Path, other: Path) -> None:
    """Check that two finished runs have the same adapter, last optimizer state, losses and evaluations."""
    mine, theirs = (load_file(next(path.glob("adapter-*.safetensors"))) for path in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(tensor.abs().sum() > 0 for tensor in mine.values())
    states = [
        torch.load(path / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True) for path in (one, other)
    ]
    figures = [json.loads((path / "result.json").read_text()) for path in (one, other)]
    assert all(
        figures[0][name] == figures[1][name] for name in ("losses", "evaluations", "value", "best_step")
    )
    for number, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][number][name]) for name, value in state.items())


def wait_for(output: Path, step: int, run: subprocess.Popen[str]) -> None:
    """Wait until a run begins to write the checkpoint of a step (0: until it is under way)."""
    sign = output / f"checkpoint-{step}" if step else output / "_run" / "run.json"
    end = time.monotonic() + 200
    while not sign.exists() and run.poll() is None:
        assert time.monotonic() < end, "the run does not come on"
        time.sleep(0.002)


def interrupted(start: Start, output: Path, step: int, pause: float, number: signal.Signals) -> str:
    """Begin or go on with a run, and signal it some seconds after a step; return what it said."""
    run = start(output, "--resume")
    wait_for(output, step, run)
    time.sleep(pause)
    run.send_signal(number)
    told, _ = run.communicate(timeout=100)
    assert run.returncode in (-number, 128 + number), told
    return told


def finish(start: Start, output: Path) -> None:
    run = start(output, "--resume")
    told, _ = run.communicate(timeout=300)
    assert run.returncode == 0, told


def test_killed_and_resumed_gives_the_same_weights(start: Start, whole: Path, tmp_path: Path) -> None:
    """While a checkpoint is being written."""
    output = tmp_path / "run"
    interrupted(start, output, 6, 0.0, signal.SIGKILL)
    finish(start, output)
    same(output, whole)


@pytest.mark.slow
def test_killed_twice_and_resumed_gives_the_same_weights(start: Start, whole: Path, tmp_path: Path) -> None:
    """Between two checkpoints, once of a run that was resumed already."""
    output = tmp_path / "run"
    interrupted(start, output, 6, 0.05, signal.SIGKILL)
    assert "resuming from checkpoint-" in interrupted(start, output, 15, 0.05, signal.SIGKILL)
    finish(start, output)
    same(output, whole)


@pytest.mark.slow
def test_stopped_by_ctrl_c_and_resumed_gives_the_same_weights(
    start: Start, whole: Path, tmp_path: Path
) -> None:
    """Where no checkpoint was due, one is saved."""
    output = tmp_path / "run"
    told = interrupted(start, output, 9, 0.0, signal.SIGINT)
    assert "stopping after this step, to save" in told
    assert f"go on with: inlay train --output {output} --resume" in told
    finish(start, output)
    same(output, whole)


@pytest.mark.slow
def test_killed_at_ten_random_moments_and_resumed(start: Start, whole: Path, tmp_path: Path) -> None:
    draw = random.Random(7)
    for number in range(5):
        early, late = sorted(draw.sample(range(0, STEPS + 1, EVERY), 2))
        output = tmp_path / str(number)
        interrupted(start, output, early, draw.random() * 0.3, signal.SIGKILL)
        interrupted(start, output, late, draw.random() * 0.1, signal.SIGKILL)
        finish(start, output)
        same(output, whole)
