"""`inlay train` and `inlay predict` to the end, on tiny models: every task, their files and figures."""

from __future__ import annotations

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner, Result

import inlay
from inlay_train import base
from inlay_train.cli import app
from inlay_train.predict import write

Write = Callable[..., Path]
Command = Callable[..., Result]
PAIRS = [
    ("it is a good day", "good"),
    ("he was so bad", "bad"),
    ("she is good", "good"),
    ("we was bad", "bad"),
] * 8


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Return a function that runs a command of `inlay` here; options are given by name."""

    def run(name: str, *arguments: Any, **options: Any) -> Result:
        words = [str(argument) for argument in arguments]
        for option, value in options.items():
            words += [f"--{option.replace('_', '-')}", str(value)]
        return CliRunner().invoke(app, [name, *words])

    return run


@pytest.fixture
def settings(models: dict[str, Path], table: Write, tmp_path: Path) -> dict[str, Any]:
    """The settings of a short run, in which single ones are changed."""
    return {"model": models["bert"], "data": table(), "task": "classification", "method": "ia3",
            "steps": 2, "output": tmp_path / "out"}  # fmt: skip


def finished(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def test_a_classifier_is_trained_saved_and_used(
    command: Command, models: dict[str, Path], table: Write, tmp_path: Path
) -> None:
    data, output = table(), tmp_path / "out"
    settings = {"model": models["bert"], "data": data, "task": "classification", "method": "lora(rank=4)",
                "output": output, "lr": 0.01, "epochs": 8, "batch": 8, "test_data": data}  # fmt: skip
    told = finished(command("train", **settings))
    result = json.loads((output / "result.json").read_text())
    assert "54 rows to learn from, 6 to evaluate on" in told
    assert f"accuracy {result['value']:.4g} on 6 rows held out" in told
    assert result["value"] == max(e["accuracy"] for e in result["evaluations"])
    assert [e["step"] for e in result["evaluations"]] == [7 * n for n in range(1, 9)]
    assert [step for step, _ in result["losses"]] == list(range(1, 57))
    assert result["losses"][-1][1] < result["losses"][0][1]
    assert (result["labels"], result["steps"]) == (["bad", "good"], 56)
    assert 0 < result["step_seconds"] < result["seconds"]
    names = {f.name for f in output.iterdir() if f.is_file()}
    assert {"inlay.json", "README.md", "curve.png", "task.json", "tokenizer.json"} <= names
    assert not any(output.rglob("model.safetensors"))
    check_picture(output / "curve.png")
    check_predictions(command, output, data, result["test"]["accuracy"], tmp_path)
    check_loads_anywhere(output, models["bert"])


def check_picture(path: Path) -> None:
    """A PNG of the size drawn, of many colours."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (800, 450)
    from matplotlib.image import imread

    assert len({tuple(pixel) for row in imread(path) for pixel in row.round(2)}) > 20


def check_predictions(command: Command, output: Path, data: Path, accuracy: float, folder: Path) -> None:
    """What is predicted for the test rows, in their order, is right as often as the run said."""
    wanted = [row["label"] for row in csv.DictReader(data.read_text().splitlines())]
    lines = finished(command("predict", output, "--json", data=data)).splitlines()
    found = [json.loads(line) for line in lines]
    right = sum(row["label"] == label for row, label in zip(found, wanted, strict=True))
    assert right / len(wanted) == pytest.approx(accuracy)
    assert accuracy > 0.6  # and it learnt something
    told = finished(command("predict", output, data=data, output=folder / "predicted.csv"))
    assert told == f"60 rows in {folder / 'predicted.csv'}\n"
    written = csv.DictReader((folder / "predicted.csv").read_text().splitlines())
    assert [row["label"] for row in written] == [row["label"] for row in found]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_predictions_are_written_as_the_ending_says(tmp_path: Path, ending: str) -> None:
    rows = [{"text": 'a, "b"', "probability": 0.5}, {"text": "é", "probability": 1.0}]
    file = tmp_path / f"predicted.{ending}"
    write(rows, file)
    if ending == "jsonl":
        assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == rows
    else:
        lines = file.read_text(encoding="utf-8").splitlines()
        found = csv.DictReader(lines, delimiter="\t" if ending == "tsv" else ",")
        assert [row["text"] for row in found] == [row["text"] for row in rows]


def check_loads_anywhere(output: Path, folder: Path) -> None:
    """`inlay.load` takes the folder, on a model that transformers made, without a warning."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inlay.load(model, output)
    assert [part.method for part in inlay.summary(model).parts] == ["trained", "lora"]


@pytest.mark.parametrize(
    ("task", "model", "more"),
    [
        ("causal-lm", "llama", {}),
        ("causal-lm", "llama", {"target": "label"}),
        ("seq2seq", "t5", {"target": "label"}),
    ],
)
def test_texts_are_learnt_and_written(
    command: Command,
    models: dict[str, Path],
    table: Write,
    tmp_path: Path,
    task: str,
    model: str,
    more: dict[str, Any],
) -> None:
    data, output = table(PAIRS), tmp_path / "out"
    settings = {"model": models[model], "data": data, "task": task, "method": "lora(rank=4)", "lr": 0.02,
                "output": output, "epochs": 6, "batch": 8, **more}  # fmt: skip
    report = json.loads(finished(command("train", "--json", **settings)).splitlines()[-1])
    first, last = report["evaluations"][0], report["evaluations"][-1]
    assert last["perplexity"] < first["perplexity"]
    assert report["value"] == min(e["perplexity"] for e in report["evaluations"])
    assert report["metric"] == "perplexity"
    rows = [
        json.loads(line) for line in finished(command("predict", output, "--json", data=data)).splitlines()
    ]
    assert len(rows) == len(PAIRS)
    if "target" in more:
        right = sum(row["text"] == label for row, (_, label) in zip(rows, PAIRS, strict=True))
        assert right >= len(PAIRS) / 2, rows[:4]


def test_head_and_full_are_there_to_compare_with(
    command: Command, models: dict[str, Path], table: Write, tmp_path: Path
) -> None:
    data = table()
    settings = {"model": models["bert"], "data": data, "task": "classification", "steps": 4, "batch": 8}
    found = {}
    for method in ("head", "full"):
        output = tmp_path / method
        finished(command("train", method=method, output=output, **settings))
        found[method] = json.loads((output / "result.json").read_text())
        finished(command("predict", output, data=data))
    assert found["head"]["parameters"] == 2 * 64 + 2
    assert found["full"]["parameters"] == found["full"]["base_parameters"]
    start = load_file(models["bert"] / "model.safetensors")
    end = load_file(tmp_path / "full" / "model.safetensors")
    name = next(name for name in start if name.endswith("query.weight"))
    assert not torch.equal(start[name], end[f"bert.{name}"])


def test_what_is_cut_is_said_once(command: Command, settings: dict[str, Any], table: Write) -> None:
    rows = [("good " * (70 if i < 6 else 3), ("good", "bad")[i % 2]) for i in range(24)]
    told = finished(command("train", **{**settings, "data": table(rows)}))
    assert told.count("are cut") == 1
    assert "6 of 24 texts (25.0%) are cut: longer than 64 tokens" in told


def test_a_finished_run_is_only_read(command: Command, settings: dict[str, Any]) -> None:
    first = json.loads(finished(command("train", "--json", **settings)).splitlines()[-1])
    again = finished(command("train", "--resume", "--json", output=settings["output"]))
    assert "this run is finished already" in again
    assert json.loads(again.splitlines()[-1]) == first


def test_a_configuration_file_describes_a_run(
    command: Command, models: dict[str, Path], table: Write, tmp_path: Path
) -> None:
    table()
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {models['bert']}\ndata: data.csv\ntask: classification\nmethod: ia3\noutput: out\nsteps: 2\n"
    )
    told = finished(command("train", file, steps=3))
    assert "3 steps" in told
    assert (tmp_path / "out" / "result.json").exists()


def test_methods_that_calibrate_see_the_training_rows(command: Command, settings: dict[str, Any]) -> None:
    """Fishmask also trains the head itself, so that nothing is trained beside it."""
    finished(command("train", **{**settings, "method": "fishmask(density=0.01)"}))
    manifest = json.loads((settings["output"] / "inlay.json").read_text())
    assert {p["name"]: bool(p["calibration"]) for p in manifest["parts"]} == {"fishmask": True}


class Stopping(threading.Thread):
    """Sends this process a signal once a checkpoint is there."""

    def __init__(self, output: Path, number: signal.Signals) -> None:
        super().__init__(daemon=True)
        self.output, self.number = output, number

    def run(self) -> None:
        while not any(self.output.glob("checkpoint-*/trainer_state.json")):
            time.sleep(0.001)
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_asked_to_stop_saves_and_says_how_to_go_on(
    command: Command, settings: dict[str, Any], number: signal.Signals, code: int
) -> None:
    output = settings["output"]
    before = signal.getsignal(number)
    stopping = Stopping(output, number)
    stopping.start()
    result = command("train", **{**settings, "steps": 400, "evaluate_every": 2})
    stopping.join()
    assert result.exit_code == code, result.output
    assert "stopping after this step, to save; once more stops at once" in result.output
    step = int(result.output.partition("saved after step ")[2].partition(";")[0])
    assert (output / f"checkpoint-{step}" / "trainer_state.json").exists()
    assert f"go on with: inlay train --output {output} --resume" in result.output
    assert not (output / "result.json").exists()
    assert signal.getsignal(number) is before


@pytest.mark.slow
def test_asked_twice_a_run_stops_at_once(settings: dict[str, Any]) -> None:
    """In a process of its own, held still in between so that both signals reach the same step."""
    settings |= {"steps": 4000, "evaluate-every": 2}
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    run = subprocess.Popen(
        [sys.executable, "-m", "inlay_train", "train", *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not any(settings["output"].glob("checkpoint-*/trainer_state.json")):
            assert run.poll() is None
            assert time.monotonic() < end, "the run does not come on"
            time.sleep(0.01)
        for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            run.send_signal(number)
        told, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, told
    assert "stopped without saving; go on with: inlay train" in " ".join(told.split())


@pytest.mark.slow
def test_a_real_encoder_learns_real_text(command: Command, tmp_path: Path) -> None:
    """The packaged MiniLM on docstrings of two packages."""
    from inlay_train.data import PACKAGES, docstrings
    from inlay_train.encoder import folder

    base.quiet()
    samples = docstrings(40)
    data = tmp_path / "data.jsonl"
    rows = [{"text": t, "label": PACKAGES[n]} for t, n in zip(samples.texts, samples.labels) if n < 2]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    settings = {"model": folder(), "data": data, "task": "classification", "method": "lora(rank=8)",
                "epochs": 4, "batch": 8, "max_length": 64, "held_out": 0.25}  # fmt: skip
    told = finished(command("train", output=tmp_path / "out", **settings))
    assert "60 rows to learn from, 20 to evaluate on" in told
    assert json.loads((tmp_path / "out" / "result.json").read_text())["value"] >= 0.8
