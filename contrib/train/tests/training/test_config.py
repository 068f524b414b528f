"""The configuration of a run: what options and files may say, and everything wrong told at once."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inlay import InlayError
from inlay_train.commands.train import train
from inlay_train.config import RunConfig, from_yaml, make
from inlay_train.prepare import Prepared, check_bits, configured, prepare

GIVEN = {"model": "m", "data": "d.csv", "task": "classification", "method": "lora", "output": "o"}


@pytest.fixture
def given(models: dict[str, Path], table: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    return {**GIVEN, "model": str(models["bert"]), "data": str(table()), "output": str(tmp_path / "out")}


def told(check: Callable[[], Any]) -> str:
    with pytest.raises(InlayError) as found:
        check()
    return str(found.value)


def test_every_setting_is_an_option_and_the_reverse() -> None:
    options = set(inspect.signature(train).parameters) - {"config", "resume", "as_json"}
    assert options == set(RunConfig.model_fields)


def test_the_help_names_the_real_defaults() -> None:
    for name, parameter in inspect.signature(train, eval_str=True).parameters.items():
        named = re.search(r"\[default: ([\w.-]+)\]", parameter.annotation.__metadata__[0].help)
        if named:
            default = RunConfig.model_fields[name].default
            assert named[1] == (default if isinstance(default, str) else f"{default:g}"), name


def test_options_win_over_the_file(tmp_path: Path, given: dict[str, Any]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {given['model']}\ndata: data.csv\ntask: classification\nmethod: lora(rank=2)\n"
                    "output: out\nmax-length: 9\nseed: 4\n")  # fmt: skip
    config = configured({"seed": 5, "method": "ia3"}, file).config
    assert (config.seed, config.method, config.max_length) == (5, "ia3", 9)
    assert config.data == tmp_path / "data.csv"  # from the file's folder, not from here
    assert config.output == tmp_path / "out"


def test_everything_wrong_with_the_settings_is_told_at_once() -> None:
    text = told(lambda: make(**{**GIVEN, "task": "clasification", "epochs": 0, "epohcs": 2, "model": 3}))
    assert text.startswith("4 things stand in the way of this run\n")
    for line in (
        "1. model has a value it cannot have: model: 3",
        "2. task has a value it cannot have: task: 'clasification'",
        "3. epochs has a value it cannot have: epochs: 0",
        "4. there is no setting 'epohcs': epohcs: 2",
        "1. input should be a valid string",
        "2. did you mean 'classification'?",
        "3. input should be greater than 0",
        "4. did you mean 'epochs'",
    ):
        assert line in text, text


def test_what_is_missing_is_named_with_its_option() -> None:
    text = told(lambda: make(task="seq2seq"))
    assert re.findall(r"pass (--\w+)", text) == ["--model", "--data", "--method", "--output"]


@pytest.mark.parametrize(
    ("task", "setting"), [("classification", "target"), ("causal-lm", "pair"), ("seq2seq", "pair")]
)
def test_a_column_the_task_does_not_read_is_refused(task: str, setting: str) -> None:
    text = told(lambda: make(**{**GIVEN, "task": task, setting: "other"}))
    assert f"a setting does not fit the task\n  saw: {setting} 'other': {task} reads no such column" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", r"the configuration file is not YAML\n.*run\.yaml: .*expected"),
        ("just text", r"does not hold settings by name\n.*'just text'"),
        ("1: 2", r"does not hold settings by name\n.*\{1: 2\}"),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(InlayError, match=message):
        from_yaml(tmp_path / "run.yaml")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InlayError, match=r"configuration file cannot be read\n.*x\.yaml: No such file"):
        from_yaml(tmp_path / "x.yaml")


def test_settings_model_method_and_data_are_all_looked_at(given: dict[str, Any]) -> None:
    """Three kinds of mistake, none of which hides another."""
    wrong = {**given, "seed": -1, "model": "no/model", "method": "lora(rnk=8)", "data": "gone.csv"}
    text = told(lambda: configured(wrong))
    for line in ("seed has a value it cannot have", "there is no such model here: 'no/model'",
                 "LoRA has no setting 'rnk'", "there is no such file: gone.csv"):  # fmt: skip
        assert line in text, text


def test_targets_and_columns_are_checked_without_weights(given: dict[str, Any], tmp_path: Path) -> None:
    """The model's folder holds a configuration alone: nothing could have been loaded."""
    config = Path(given["model"]) / "config.json"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes(config.read_bytes())
    bare = {**given, "model": str(tmp_path / "bare")}
    prepared = prepare(make(**bare))
    assert isinstance(prepared, Prepared)
    assert prepared.heads == ("classifier",)
    wrong = {**bare, "method": "lora(targets=['quary'])", "label": "lable"}
    text = told(lambda: prepare(make(**wrong)))
    assert "2 things stand in the way" in text
    assert "did you mean 'query'" in text
    assert "did you mean 'label'" in text


def test_heads_learn_beside_a_method_unless_told_otherwise(given: dict[str, Any]) -> None:
    assert prepare(make(**given)).train == ("head",)
    assert prepare(make(**{**given, "train": []})).train == ()
    alone = prepare(make(**{**given, "method": "head"}))
    assert [part["method"] for part in alone.parts] == ["trained"]
    assert alone.train == ()
    full = prepare(make(**{**given, "method": "full"}))
    assert (full.stack, full.parts) == (None, [])


def test_a_quantised_base_is_not_trained_whole(given: dict[str, Any]) -> None:
    with pytest.raises(
        InlayError, match=r"quantised model cannot be trained as a whole\n.*--bits 4 --method full"
    ):
        prepare(make(**{**given, "bits": 4, "method": "full"}))


def test_a_quantised_base_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(InlayError, match=r"needs bitsandbytes\n.*--bits 8.*\n.*pip install bitsandbytes"):
        check_bits(make(**{**GIVEN, "bits": 8}))


def test_without_a_method_installed_the_package_is_named(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INLAY_LOAD_PLUGINS", "")
    text = told(lambda: configured({**given, "method": "lora + ia3"}))
    assert "the stack needs methods that are not installed" in text
    assert "pip install inlay-lora inlay-scaling" in text
