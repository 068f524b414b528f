"""`python -m inlay` runs the command of whichever package brings it, which core does not know."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from inlay import __main__ as module


def test_without_a_package_that_brings_the_command_it_says_which_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing(**chosen: Any) -> list[Any]:
        return []

    monkeypatch.setattr(module, "entry_points", nothing)
    with pytest.raises(
        SystemExit, match=r"there is no `inlay` command here\n  saw: (.|\n)*pip install inlay-train"
    ):
        module.main()


def test_it_runs_the_installed_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["inlay", "methods"])
    module.main()
    assert "lora" in capsys.readouterr().out
