"""The tutorial's commands, run in its order and in one folder, on the packaged model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from inlay_train.cli import app
from inlay_train.encoder import folder

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tutorial.md"
BLOCKS = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODEL = 'MODEL=$(python -c "from inlay_train.encoder import folder; print(folder())")\n'


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several test processes share few cores; waiting threads would slow each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_commands_of_the_tutorial_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks but the first, which makes the data, run in tests/docs."""
    monkeypatch.chdir(tmp_path)
    blocks = BLOCKS.findall(PAGE.read_text(encoding="utf-8"))
    exec(next(text for language, text in blocks if language == "python"), {})
    shell = [text for language, text in blocks if language == "bash"]
    assert MODEL in shell
    shell.remove(MODEL)
    done = []
    for line in "".join(shell).splitlines():
        words = shlex.split(line.replace("$MODEL", str(folder())))
        assert words[0] == "inlay"
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, (line, result.output)
        done.append(words[1])
    assert done == ["methods", "plan", "train", "predict", "inspect", "merge"]
    assert len((tmp_path / "labelled.csv").read_text().splitlines()) == 37
    config = json.loads((tmp_path / "intents-merged" / "config.json").read_text())
    assert sorted(config["label2id"]) == ["account", "delivery", "payment"]
    for name in ("curve.png", "README.md", "result.json"):
        assert (tmp_path / "intents" / name).stat().st_size > 0
