"""`inlay compare` on a tiny real model and table: figures, files, going on, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from inlay import InlayError
from inlay_train.compare import report
from inlay_train.compare.setup import listed
from inlay_train.predict import Predictor

METHODS = "lora(rank=4, alpha=8.0); lora(rank=4) + p_tuning_v2(length=4)"
Write = Callable[..., Path]


def values(models: dict[str, Path], data: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(models["bert"]),
        "data": data,
        "task": "classification",
        "batch": 8,
        "steps": 12,
        **more,
    }


@pytest.mark.xdist_group("compare")
def test_a_comparison_from_command_to_page(
    models: dict[str, Path], table: Write, inlay_command: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("compare", "--model", models["bert"], "--data", table(), "--task", "classification",
                 "--methods", METHODS, "--seeds", 2, "--rates", "1", "--steps", 12, "--batch", 8,
                 "--processes", 2, "--output", out)  # fmt: skip
    done = inlay_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "accuracy in %, 2 seeds: mean ± standard deviation" in done.stdout
    assert "lora(rank=4, alpha=8.0), seed 1: accuracy" in done.stdout
    assert {f.name for f in out.iterdir()} >= {"comparison.html", "comparison.json", "share.png", "time.png"}

    again = inlay_command(*arguments, "--json")  # nothing is trained again, nothing else is printed
    content = json.loads(again.stdout)
    rows = {row["stack"]: row for row in content["rows"]}
    assert list(rows) == [row["stack"] for row in sorted(content["rows"], key=lambda r: -r["mean"])]
    lora = rows["lora(rank=4, alpha=8.0)"]
    assert len(lora["values"]) == 2
    assert lora["parameters"] == 2 * 2 * 4 * 128 + 2 * 64 + 2  # query and value of two layers; the head
    assert lora["merges"] == "yes"
    assert lora["steps"] == 12
    assert lora["step_seconds"] > 0
    assert lora["peak_bytes"] > 10**8
    assert [step for step, _ in lora["losses"]] == list(range(1, 13))
    assert rows["lora(rank=4) + p_tuning_v2(length=4)"]["merges"] == "lora only"
    kept = Predictor(out / "adapters" / lora["runs"][0]).rows(out / "data" / "test.jsonl")
    known = [json.loads(line)["label"] for line in (out / "data" / "test.jsonl").read_text().splitlines()]
    right = [row["label"] == label for row, label in zip(kept, known, strict=True)]
    assert sum(right) / len(right) == pytest.approx(lora["values"][0])


@pytest.mark.slow
def test_rates_are_chosen_on_training_rows_alone(
    models: dict[str, Path], table: Write, tmp_path: Path
) -> None:
    """Two test rows; what chooses is measured on a fifth of the others, which are 12."""
    held = table([("zzz zzz", "good"), ("yyy yyy", "bad")], file="held.csv")
    content = report.run(
        values(models, table(), test_data=held, steps=2), "lora", tmp_path / "out", seeds=1, rates="0.5 1",
        quiet=True,
    )  # fmt: skip
    assert content["rows"][0]["values"][0] in (0.0, 0.5, 1.0)  # of two rows
    assert sorted(content["rows"][0]["tried"]) == ["0.5", "1"]
    assert all(
        value * 12 == pytest.approx(round(value * 12)) for value in content["rows"][0]["tried"].values()
    )
    assert len((tmp_path / "out" / "data" / "learn.jsonl").read_text().splitlines()) == 60


@pytest.mark.slow  # tests/compare/test_budget.py solves; this trains with what was solved
def test_sizes_are_solved_for_a_budget(models: dict[str, Path], table: Write, tmp_path: Path) -> None:
    content = report.run(
        values(models, table(), steps=1), "lora; p_tuning_v2", tmp_path / "out", seeds=1, rates="1",
        budget=2048, quiet=True,
    )  # fmt: skip
    assert {row["trained"]: row["parameters"] for row in content["rows"]} == {
        "lora(rank=4)": 2048 + 130, "p_tuning_v2(length=8)": 2048 + 130,
    }  # fmt: skip


def test_everything_wrong_is_said_at_once(models: dict[str, Path], table: Write, tmp_path: Path) -> None:
    data = table([("a day", "good")] * 5)
    with pytest.raises(InlayError) as raised:
        report.run(
            values(models, data, label="mood"), "lora; loro; ia3(rank=3)", tmp_path / "out", quiet=True
        )
    for text in ("no column 'mood'", "'loro'", "has no setting 'rank'"):
        assert text in str(raised.value)
    assert "3 things stand in the way" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_lists_of_methods_that_cannot_be_compared() -> None:
    assert listed(' head ;lora.named("a;b"); ') == ["head", 'lora.named("a;b")']
    with pytest.raises(InlayError, match=r"cannot be compared\n.*no method in ' ; '"):
        listed(" ; ")
    with pytest.raises(InlayError, match=r"cannot be compared\n.*'lora' twice"):
        listed("lora; ia3;lora")


def test_rates_that_are_none(models: dict[str, Path], table: Write, tmp_path: Path) -> None:
    for rates in ("", "fast", "1 0", "inf"):
        with pytest.raises(InlayError, match=rf"multiples of a learning rate\n.*--rates '{rates}'"):
            report.run(values(models, table()), "lora", tmp_path / "out", rates=rates, quiet=True)


def test_an_output_that_is_a_file(models: dict[str, Path], table: Write, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InlayError, match=r"the output is not a folder\n.*taken"):
        report.run(values(models, table()), "lora", tmp_path / "taken", quiet=True)


def test_ctrl_c_keeps_what_was_measured_and_says_how_to_go_on(
    models: dict[str, Path], table: Write, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "inlay_train", "compare", "--model", str(models["bert"]),
         "--data", str(table()), "--task", "classification", "--methods", "lora", "--steps", "100000",
         "--output", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell's background jobs, and so their tests, are started with Ctrl-C ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not list(out.glob("logs/*")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "the same command goes on from there" in " ".join(said.split())
    assert "Traceback" not in said
    assert process.returncode == 130
