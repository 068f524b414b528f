"""The `inlay` command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from inlay_train.cli import app


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "inlay_train", "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: inlay" in done.stdout
    assert "demo" in done.stdout


def test_errors_are_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "taken")])
    assert result.exit_code == 1
    assert "the output is not a folder" in result.output
    assert "Traceback" not in result.output
