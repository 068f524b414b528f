"""The page on writing a method: what it shows is what `inlay new` writes, and keeps the kit's rules."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "write-a-method.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
METHOD = BLOCKS[0]
QUICK = ("R01", "R08", "R09", "R26", "R34")
counting = runpy.run_path(str(ROOT / "benchmarks" / "counting.py"))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The page's method and conformance class as a distribution on the path, without an installation."""
    info = tmp_path / "inlay_gated_lora-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: inlay-gated-lora\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[inlay.methods]\ngated_lora = inlay_gated_lora:GatedLora\n")
    (tmp_path / "inlay_gated_lora.py").write_text(METHOD)
    (joining,) = [block for block in BLOCKS if "(MethodConformance)" in block]
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_conformance.py").write_text(f"from inlay_gated_lora import GatedLora\n{joining}")
    return tmp_path


def passing(package: Path, *arguments: str) -> int:
    """Run the page's conformance test as its reader does; return how many rules passed (all of them)."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "1",
        "INLAY_WRITE_GOLDEN": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "tests", *arguments]
    done = subprocess.run(
        command, cwd=package, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-8000:]
    (passed,) = re.findall(r"^(\d+) passed", done.stdout, re.MULTILINE)
    return int(passed)


def test_the_method_has_at_most_60_lines() -> None:
    assert "class GatedLora(Method)" in METHOD
    assert 20 < counting["code_lines"](METHOD) <= 60
    assert len([line for line in METHOD.splitlines() if line.strip()]) <= 60


def test_the_method_is_the_one_that_inlay_new_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "inlay_train", "new", "gated-lora", "--output", str(tmp_path / "new")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "new" / "inlay_gated_lora" / "__init__.py").read_text() == METHOD
    written = (tmp_path / "new" / "pyproject.toml").read_text()
    assert 'gated_lora = "inlay_gated_lora:GatedLora"' in written


def test_the_method_keeps_some_rules(package: Path) -> None:
    assert passing(package, "-k", " or ".join(QUICK)) == len(QUICK)


@pytest.mark.slow
def test_the_method_keeps_every_rule(package: Path) -> None:
    assert passing(package) > 30


def test_the_errors_it_lists_are_errors_of_core() -> None:
    section = PAGE.split("## Errors you may meet")[1]
    listed = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)))
    assert len(listed) > 15
    source = "\n".join(
        p.read_text() for p in (ROOT / "core" / "inlay").rglob("*.py") if "testing" not in p.parts
    )
    assert [text for text in listed if text not in source] == []


def test_every_hook_face_and_method_of_init_is_named() -> None:
    from inlay import delta
    from inlay.adapter import Init
    from inlay.contract import HOOKS

    faces = {kind.__name__ for kind in delta.Delta.__subclasses__() if kind.__module__ == delta.__name__}
    makers = {name for name, f in vars(Init).items() if callable(f) and not name.startswith("_")}
    assert len(faces) == 5
    for name in (*HOOKS, *faces, *makers):
        assert re.search(rf"`{name}\b", PAGE), name
