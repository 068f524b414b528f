"""The journal's lines, on real tiny models and this package's small method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.authoring import Init, Method, OutputDelta, Site, register, setting
from inlay.errors import CannotMerge, ConfigError, RegistryError
from inlay.registry import registry
from inlay_journal import Journal


class Gain(OutputDelta):
    """Δy = g ⊙ y, with g (out,) zero at the start; folds if told to."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, site: Site, init: Init, folds: bool) -> None:
        super().__init__()
        self.gain, self._folds = init.zeros(site.out_features), folds

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return self.gain * y

    @property
    def folds(self) -> bool:
        return self._folds

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain = 1 + self.gain.to(weight.dtype)
        return gain[:, None] * weight, None if bias is None else gain * bias


@dataclass(frozen=True, kw_only=True)
class Gained(Method):
    """A gain of each output."""

    id: ClassVar[str] = "gained"
    folds: bool = setting(True)

    def delta(self, site: Site, init: Init) -> Gain:
        if site.name == "1":
            raise ValueError("no gain here")
        return Gain(site, init, self.folds)


@pytest.fixture(autouse=True)
def offered() -> Iterator[None]:
    register(Gained)
    yield
    registry.forget(Gained)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_attaching_loading_and_merging_are_noted(model: nn.Module, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with inlay.observe(journal):
        inlay.attach(model, Gained(targets=("0", "2")), name="fr")
        inlay.save(model, tmp_path / "saved")
        inlay.merge(model, undo=False)
        inlay.load(model, tmp_path / "saved", name="again")
    found = lines(journal.path)
    assert [(e["event"], e["adapter"]) for e in found] == [
        ("attach", "fr/gained"), ("merge", "fr/gained"), ("load", "again/gained"),
    ]  # fmt: skip
    for entry in found:
        assert (entry["method"], entry["sites"], entry["parameters"], entry["error"]) == (
            "gained", 2, 4 + 3, None,
        )  # fmt: skip
        assert entry["settings"]["targets"] == ["0", "2"]
        assert 0 <= entry["seconds"] < 60
        assert datetime.fromisoformat(entry["time"]).tzinfo is not None


def test_what_only_asks_is_not_noted(model: nn.Module, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    inlay.attach(model, Gained(targets=("0",)))
    with inlay.observe(journal):
        inlay.plan(model, Gained(targets=("0", "2")))
        assert inlay.summary(model).parts[0].mergeable
    inlay.detach(model)
    assert lines(journal.path) == []


def test_failures_are_noted_and_raised_unchanged(model: nn.Module, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with inlay.observe(journal), pytest.raises(ValueError, match="no gain here"):
        inlay.attach(model, Gained(targets=("0", "1")))
    inlay.attach(model, Gained(targets=("0",), folds=False), name="kept")
    with inlay.observe(journal), pytest.raises(CannotMerge, match="cannot be merged"):
        inlay.merge(model)
    first, second = lines(journal.path)
    assert (first["event"], first["error"]) == ("attach", "ValueError: no gain here")
    assert (second["event"], second["adapter"]) == ("merge", "kept/gained")
    assert second["error"].startswith("CannotMerge: 'gained' cannot be merged")


def test_it_appends_and_changes_no_result(model: nn.Module, tmp_path: Path) -> None:
    path, x = tmp_path / "journal.jsonl", torch.ones(2, 3)
    path.write_text('{"event": "before"}\n')
    with inlay.observe(Journal(path)):
        plan = inlay.attach(model, Gained(targets=("0",)), seed=1)
    observed = model(x)
    inlay.detach(model)
    assert str(plan) == str(inlay.attach(model, Gained(targets=("0",)), seed=1))
    assert torch.equal(model(x), observed)
    assert [entry["event"] for entry in lines(path)] == ["before", "attach"]


def test_a_journal_without_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INLAY_JOURNAL", raising=False)
    with pytest.raises(ConfigError, match="the journal does not know its file"):
        Journal()
    with pytest.raises(ConfigError, match="the journal cannot be written"):
        Journal(tmp_path / "no such folder" / "journal.jsonl")


def test_by_name_it_takes_the_file_of_the_environment(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INLAY_JOURNAL", str(tmp_path / "journal.jsonl"))
    with inlay.observe("journal"):
        inlay.attach(model, Gained(targets=("0",)))
    assert [entry["event"] for entry in lines(tmp_path / "journal.jsonl")] == ["attach"]
    monkeypatch.delenv("INLAY_JOURNAL")
    with pytest.raises(RegistryError, match=r"'journal' failed to import[\s\S]*INLAY_JOURNAL is not set"):
        inlay.observe("journal").__enter__()


CODE = """
import sys, torch, inlay
inlay.attach(torch.nn.Sequential(torch.nn.Linear(3, 4)), "trained(targets=['0'])")
print("inlay_journal" in sys.modules)
"""


@pytest.mark.parametrize("named", [True, False])
def test_it_is_off_until_the_environment_names_it(named: bool, tmp_path: Path) -> None:
    """In a process of its own, from its first line on."""
    path = tmp_path / "journal.jsonl"
    environment = {k: v for k, v in os.environ.items() if k != "INLAY_OBSERVERS"} | {
        "INLAY_JOURNAL": str(path)
    }
    if named:
        environment["INLAY_OBSERVERS"] = "journal"
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    assert done.stdout == f"{named}\n"
    assert path.exists() is named
    if named:
        assert [(e["event"], e["method"]) for e in lines(path)] == [("attach", "trained")]
