"""Packages of strangers: a method and an observer, from their wheels, beside core's wheel alone.

Nothing else in the checkout knows them. They are in nobody's install but the environment made here,
their tests run there, and no file outside their folders names them but the pages that point to them.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from environments import ROOT, Wheels, output
from environments import environment as make

COMMAND, METHOD, OBSERVER = (ROOT / "contrib" / name for name in ("train", "dconv", "journal"))
STRANGERS = {METHOD: r"dconv|DConv", OBSERVER: r"inlay[_-]journal|contrib/journal|INLAY_JOURNAL"}
POINTING = {"docs/write-a-method.md", "docs/hooks.md", "README.md", "README.zh.md", "CHANGELOG.md"}
QUICK = ("R01", "R08", "R26", "R27", "R28", "R34")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
counting = runpy.run_path(str(ROOT / "benchmarks" / "counting.py"))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheels: Wheels) -> Path:
    """The python of an environment with core, the command line and the two packages, all from wheels."""
    return make(tmp_path_factory.mktemp("strangers") / "env", wheels, ROOT, COMMAND, METHOD, OBSERVER)


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    """A folder with the method's tests, and the observer's, far from their sources."""
    for package in STRANGERS:
        shutil.copytree(package / "tests", tmp_path / package.name)
    return tmp_path


def run_tests(python: Path, *arguments: str, cwd: Path) -> int:
    """Run pytest there, as the strangers would; return how many tests passed (all of them)."""
    said = output(python, "-m", "pytest", "-q", "-W", "error", *arguments, cwd=cwd, OMP_NUM_THREADS="1")
    (passed,) = re.findall(r"^(\d+) passed", said, re.MULTILINE)
    assert "failed" not in said
    assert "skipped" not in said
    return int(passed)


def test_both_are_found_and_work_as_their_readmes_say(python: Path) -> None:
    pages = [PYTHON.findall((package / "README.md").read_text()) for package in STRANGERS]
    assert all(pages)
    code = "\n".join([*(block for blocks in pages for block in blocks), "print(sorted(inlay.methods()))"])
    assert output(python, "-W", "error", "-c", code).splitlines()[-1] == "['dconv', 'dense', 'trained']"


def check(python: Path, *arguments: str, cwd: Path) -> dict[str, Any]:
    """Run `inlay check`, which must find all well; return its report."""
    said = output(python.with_name("inlay"), "check", *arguments, "--json", cwd=cwd, OMP_NUM_THREADS="1")
    report: dict[str, Any] = json.loads(said)
    assert report["good"], report
    assert report["counts"]["failed"] == report["counts"]["excused"] == 0
    return report


def test_the_method_keeps_some_rules(python: Path, tests: Path) -> None:
    report = check(python, "dconv/test_conformance.py", "--rules", ",".join(QUICK), cwd=tests)
    assert report["counts"]["passed"] == len(QUICK)


@pytest.mark.slow
def test_the_method_keeps_every_rule(python: Path, tests: Path) -> None:
    report = check(python, "dconv/test_conformance.py", cwd=tests)
    assert report["counts"]["passed"] > 30
    outcomes = {rule["outcome"] for rule in report["rules"]}
    assert outcomes == {"passed", "other"}  # other: rules about merging, which it does not


@pytest.mark.slow
def test_the_installed_wheel_alone_can_be_checked(python: Path, tmp_path: Path) -> None:
    """Without its tests, whose place a class derived from its settings takes."""
    report = check(python, "inlay-dconv", "--rules", "R01,R20,R28", cwd=tmp_path)
    assert report["derived"]
    assert (report["version"], report["counts"]["passed"]) == ("0.1.0", 3)


@pytest.mark.slow
def test_the_method_is_its_equation_however_the_tokens_come(python: Path, tests: Path) -> None:
    assert run_tests(python, "dconv/test_dconv.py", cwd=tests) > 20


def test_the_observer_notes_what_happens(python: Path, tests: Path) -> None:
    assert run_tests(python, "journal", cwd=tests) >= 8


def test_the_method_has_at_most_60_lines_of_code_and_joins_the_kit_in_15() -> None:
    assert counting["code_lines"]((METHOD / "inlay_dconv" / "dconv.py").read_text()) <= 60
    joining = (METHOD / "tests" / "test_conformance.py").read_text()
    assert counting["code_lines"](joining) <= 15


def test_both_are_whole_packages() -> None:
    for package in STRANGERS:
        for file in ("pyproject.toml", "README.md", "LICENSE", f"inlay_{package.name}/__init__.py"):
            assert (package / file).is_file(), file


@pytest.mark.parametrize("package", STRANGERS, ids=lambda p: p.name)
def test_no_other_file_names_it(package: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    own = package.relative_to(ROOT).as_posix() + "/"
    named = {
        name
        for name in filter(None, files)
        if not name.startswith(own) and (ROOT / name).suffix not in {".png", ".safetensors"}
        if (ROOT / name).is_file() and re.search(STRANGERS[package], (ROOT / name).read_text(errors="ignore"))
    }
    assert named - POINTING == {"tests/packages/test_stranger.py"}
