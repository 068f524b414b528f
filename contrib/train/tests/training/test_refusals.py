"""What `inlay train` and `inlay predict` refuse, in which words, and that nothing was touched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inlay_train.cli import app

Refused = Callable[..., str]
GOOD, BAD = ["it is a good day", "good"], ["he was so bad", "bad"]
HOLD = """
import sys
from pathlib import Path
from inlay_train.folder import Folder
with Folder(Path(sys.argv[1])).claimed():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def settings(models: dict[str, Path], table: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    return {"model": models["bert"], "data": table([GOOD, BAD] * 8), "task": "classification",
            "method": "ia3", "output": tmp_path / "out", "steps": 2}  # fmt: skip


def call(name: str, *arguments: Any, **options: Any) -> Any:
    words = [str(argument) for argument in arguments]
    words += [w for option, value in options.items() for w in (f"--{option.replace('_', '-')}", str(value))]
    return CliRunner().invoke(app, [name, *words])


@pytest.fixture
def refused() -> Refused:
    def run(name: str, *arguments: Any, **options: Any) -> str:
        result = call(name, *arguments, **options)
        assert result.exit_code == 1, result.output
        assert "Traceback" not in result.output
        return str(result.output)

    return run


@pytest.fixture
def run_there(settings: dict[str, Any]) -> Path:
    """The output folder of a run that ended."""
    result = call("train", **settings)
    assert result.exit_code == 0, result.output
    return Path(settings["output"])


def test_everything_is_refused_before_a_folder_is_made(refused: Refused, settings: dict[str, Any]) -> None:
    told = refused("train", **{**settings, "label": "lable", "method": "lora(rank=0)"})
    assert "2 things stand in the way of this run" in told
    assert "the data has no column 'lable'" in told
    assert not Path(settings["output"]).exists()


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [GOOD] * 4,
            "there is nothing to tell apart: the data has one label only\n  saw: 4 rows labelled 'good'",
        ),
        ([], "the data has no rows"),
        ([GOOD, BAD], "nothing can be held out: every label has a single row"),
    ],
)
def test_data_that_cannot_be_learnt_from(
    refused: Refused, settings: dict[str, Any], table: Callable[..., Path], rows: Any, told: str
) -> None:
    assert told in refused("train", **{**settings, "data": table(rows, file="other.csv")})


def test_undecodable_text_and_unseen_labels(
    refused: Refused, settings: dict[str, Any], table: Callable[..., Path], tmp_path: Path
) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\nna\xefve,good\n".encode("latin-1"))
    other = table([GOOD, ["who", "ugly"]], file="eval.csv")
    told = refused("train", **{**settings, "data": latin})
    assert "the file is not text in the encoding utf-8\n  saw: byte 0xef in line 2 of latin.csv" in told
    told = refused("train", **{**settings, "eval_data": other})
    assert "labels to evaluate on do not occur in training\n  saw: 'ugly' in 1 rows" in told
    told = refused("train", **{**settings, "test_data": other})
    assert "'ugly' first in line 3 of eval.csv" in told


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the output folder."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    yield other
    other.communicate(timeout=60)


def test_an_output_folder_in_use_is_refused(
    refused: Refused, settings: dict[str, Any], holder: subprocess.Popen[str]
) -> None:
    told = refused("train", **settings)
    assert (
        f"another run is writing to the output folder\n  saw: process {holder.pid} in {settings['output']}"
        in told
    )


def test_an_output_that_is_a_file_is_refused(refused: Refused, settings: dict[str, Any]) -> None:
    Path(settings["output"]).write_text("mine")
    told = refused("train", **settings)
    assert "the output folder cannot be made\n" in told
    assert Path(settings["output"]).read_text() == "mine"


def test_a_folder_with_a_run_is_not_begun_anew(
    refused: Refused, settings: dict[str, Any], run_there: Path
) -> None:
    before = {f: f.read_bytes() for f in run_there.glob("*") if f.is_file()}
    told = refused("train", **settings)
    assert (
        f"the output folder holds a run already\n  saw: {run_there}\n  do:  go on with it by --resume" in told
    )
    assert {f: f.read_bytes() for f in run_there.glob("*") if f.is_file()} == before


def test_resuming_as_another_run_lists_the_differences(
    refused: Refused, settings: dict[str, Any], run_there: Path, table: Callable[..., Path],
    models: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    base = tmp_path / "base"
    shutil.copytree(models["bert"], base)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    data = table([GOOD, BAD] * 9, file="more.csv")
    told = refused("train", "--resume", output=run_there, model=base, data=data, method="ssf", seed=3)
    assert "this is not the run in the output folder, so it cannot go on with it" in told
    for line in (f"model: other files than the run began with ({models['bert']})",
                 f"data: another content than {settings['data']} had",
                 "method: ia3 then, ssf now", "seed: 0 then, 3 now"):  # fmt: skip
        assert f"\n  {line}\n" in told


def test_the_same_files_elsewhere_are_the_same_run(
    settings: dict[str, Any], run_there: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(models["bert"], tmp_path / "copy")
    result = call("train", "--resume", output=run_there, model=tmp_path / "copy", method="ia3( )")
    assert result.exit_code == 0, result.output
    assert "finished already" in result.output


def test_there_must_be_a_run_to_resume(refused: Refused, tmp_path: Path) -> None:
    told = refused("train", "--resume", output=tmp_path / "none")
    assert f"there is no run to resume in the output folder\n  saw: {tmp_path / 'none'}" in told
    assert not (tmp_path / "none").exists()


def test_a_damaged_record_is_told(refused: Refused, run_there: Path) -> None:
    (run_there / "_run" / "run.json").write_text('{"config": ')
    told = refused("train", "--resume", output=run_there)
    assert "the folder's record of its run is damaged" in told


def test_training_that_diverges_ends_with_an_error(refused: Refused, settings: dict[str, Any]) -> None:
    told = refused("train", **{**settings, "lr": 1e30, "steps": 8, "evaluate_every": 1})
    assert "training diverged: the " in told
    assert "saw: every trained value is finite, the largest 1e+30 in the part default/" in told
    assert "the last good checkpoint is " in told


def test_texts_longer_than_the_positions_are_refused(refused: Refused, settings: dict[str, Any]) -> None:
    told = refused("train", **{**settings, "max_length": 65})
    assert "saw: --max-length 65; the tokenizer's limit is 64, the model's 64" in told
    assert "do:  give --max-length 64 or less" in told
    assert not Path(settings["output"]).exists()


def test_virtual_tokens_count_among_the_positions(refused: Refused, settings: dict[str, Any]) -> None:
    """Rows of 6 tokens, the one at the end among them, beside 60: two positions too few."""
    told = refused("train", **{**settings, "method": "prompt_tuning(length=60)"})
    assert "virtual tokens and those of the text take more positions than the model has\n" in told
    assert "saw: 60 virtual tokens, 6 of the text, 64 positions\n  do:  use a shorter prompt" in told
    assert "--max-length" in told
    assert not Path(settings["output"]).exists()


def test_a_full_disk_at_the_end_is_told(refused: Refused, settings: dict[str, Any]) -> None:
    output = Path(settings["output"])
    output.mkdir()
    (output / "curve.png").symlink_to("/dev/full")
    told = refused("train", **settings)
    assert (
        f"the run's files cannot be written; is the disk full?\n  saw: {output}: No space left on device"
        in told
    )
    assert f"make room, then resume: {output / 'checkpoint-2'} is whole" in told
    (output / "curve.png").unlink()
    again = call("train", "--resume", output=output)
    assert again.exit_code == 0, again.output
    assert (output / "result.json").exists()


def damaged(model: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(model, folder)
    change(folder)
    return folder


def no_padding(folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            kept = json.loads((folder / name).read_text())
            kept = {k: v for k, v in kept.items() if k not in ("pad_token", "eos_token")}
            (folder / name).write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100),
            "the model's weights cannot be loaded",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{"), "the model's tokenizer cannot be read"),
        (no_padding, "the tokenizer has no token to pad a batch with"),
        (lambda f: (f / "config.json").write_text("{"), "the model's configuration cannot be read"),
    ],
)
def test_a_damaged_model_is_told(
    refused: Refused,
    settings: dict[str, Any],
    models: dict[str, Path],
    tmp_path: Path,
    change: Any,
    told: str,
) -> None:
    model = damaged(models["bert"], tmp_path / "model", change)
    assert told in refused("train", **{**settings, "model": model})
    assert not Path(settings["output"]).exists()


def test_predicting_needs_a_finished_run_and_its_columns(
    refused: Refused, settings: dict[str, Any], run_there: Path, tmp_path: Path, table: Callable[..., Path]
) -> None:
    told = refused("predict", tmp_path, data=settings["data"])
    assert f"this is not the output folder of a finished run\n  saw: {tmp_path / 'task.json'}: " in told
    other = table([["a"]], names=("words",), file="other.csv")
    told = refused("predict", run_there, data=other)
    assert "the data has no column 'text'\n  saw: other.csv with the columns 'words'" in told
    told = refused("predict", run_there, data=settings["data"], output=tmp_path / "x.xlsx")
    assert "predictions are not written as this kind of file\n  saw: x.xlsx ends in '.xlsx'" in told
    told = refused("predict", run_there, data=settings["data"], model="gone/model")
    assert "there is no such model here" in told
