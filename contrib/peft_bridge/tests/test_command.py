"""`inlay convert`: folders to folders, with the base's config.json alone where its weights are not needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from twins import TWINS, far, loaded_by_peft, logits, saved_by_peft

import inlay
from inlay.testing.layers import settled
from inlay.testing.tools import shake


def convert(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inlay_train", "convert", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_there(name: str, tmp_path: Path) -> None:
    expected = saved_by_peft("bert", TWINS[name], tmp_path / "theirs")
    settled("bert").save_pretrained(tmp_path / "base")
    base = tmp_path / "base" if name == "dora" else tmp_path / "base" / "config.json"
    done = convert("--from", "peft", tmp_path / "theirs", tmp_path / "ours", "--base", base, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == name
    model = settled("bert")
    inlay.load(model, tmp_path / "ours")
    assert far(logits(model), expected) < 1e-5


def test_back(tmp_path: Path) -> None:
    model = settled("bert")
    model.save_pretrained(tmp_path / "base")
    inlay.attach(model, "lora(rank=2)", train=("head",), seed=0)
    shake(model)
    inlay.save(model, tmp_path / "ours")
    done = convert("--to", "peft", tmp_path / "ours", tmp_path / "theirs", "--base", tmp_path / "base")
    assert done.returncode == 0, done.stderr
    assert "LORA as lora: 5 sites" in done.stdout
    assert far(logits(loaded_by_peft("bert", tmp_path / "theirs")), logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--from", "peft", "--to", "peft"], "one of the two formats is inlay's own"),
        (["--from", "loralib"], "no installed package converts this format"),
        (["--from", "peft"], "a file of the adapter is missing"),
    ],
)
def test_refusals(words: list[str], reason: str, tmp_path: Path) -> None:
    done = convert(*words, tmp_path, tmp_path / "out", "--base", tmp_path)
    assert done.returncode == 1
    assert reason in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_none(tmp_path: Path) -> None:
    saved_by_peft("bert", TWINS["lora"], tmp_path / "theirs")
    done = convert("--from", "peft", tmp_path / "theirs", tmp_path / "out", "--base", tmp_path)
    assert done.returncode == 1
    assert "the base model's configuration cannot be read" in done.stderr
