"""Packages with a method, good or broken in one thing, on a path without installation; the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
ENTRY = "[inlay.methods]\nacme = inlay_acme:Acme\n"
PACKAGE = '''
from dataclasses import dataclass
from typing import ClassVar, Literal

from inlay.authoring import Method, OutputDelta, setting


class Low(OutputDelta):
    def __init__(self, site, init, rank):
        super().__init__()
        self.down = init.kaiming_uniform(rank, site.in_features)
        self.up = init.zeros(site.out_features, rank)

    def forward(self, x, y, at):
        return x @ self.down.T @ self.up.T

    def fold(self, weight, bias):
        return weight + {factor} * self.up.to(weight.dtype) @ self.down.to(weight.dtype), bias


@dataclass(frozen=True, kw_only=True)
class Acme(Method):
    """A low-rank change of each target, for tests of what checks it. Parameters: r·(in + out) a layer."""

    id: ClassVar[str] = "acme"
    paper: ClassVar[str] = "2106.09685"
    rank: int = setting(8, least=1)
    kind: Literal["plain", "fancy"] = "plain"

    def delta(self, site, init):
        return Low(site, init, self.rank)
'''
CLASSES = """
from hypothesis import strategies as st

from inlay.testing import MethodConformance
from inlay_acme import Acme


def test_another_thing():
    raise AssertionError("this is none of the kit's tests")


class TestAcme(MethodConformance):
    method = Acme
    configurations = st.builds(Acme, rank=st.integers(1, 4))
    merges = True
    excused = {excused}
"""


@dataclass(frozen=True)
class Ran:
    """What the command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def words(self) -> str:
        """What was printed, however lines were broken."""
        return " ".join(self.out.split())


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a distribution of one module; it is found on PYTHONPATH."""

    def write(code: str = "", *, entries: str = ENTRY, name: str = "inlay-acme", factor: object = 1) -> Path:
        folder, module = tmp_path / "packages" / name, name.replace("-", "_")
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entries)
        (folder / f"{module}.py").write_text(textwrap.dedent(code) or PACKAGE.format(factor=factor))
        return folder

    return write


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Return a folder with a test file about the package's method."""
    folder = tmp_path / "its tests"
    folder.mkdir()
    excused = {"R22": "it is kept all the same", "R08": "not counted"}
    (folder / "test_acme.py").write_text(CLASSES.format(excused=excused))
    return folder


@pytest.fixture
def inlay(tmp_path: Path) -> Callable[..., Ran]:
    """Return a function that runs the command, packages in the given folders beside what is installed."""

    def run(*arguments: object, path: tuple[Path, ...] = (), **environment: str) -> Ran:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("INLAY_", "PYTHONPATH"))}
        kept |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "200", **environment}
        done = subprocess.run(
            [sys.executable, "-m", "inlay_train", *map(str, arguments)],
            cwd=tmp_path, env=kept, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
