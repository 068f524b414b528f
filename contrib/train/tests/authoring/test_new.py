"""`inlay new`: names that are refused, files all or none, and a package that keeps every rule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inlay.errors import InlayError
from inlay_train.scaffold.names import Names, check_free, named
from inlay_train.scaffold.write import TEMPLATES, _write, create, imported, rendered

TRAIN = TEMPLATES.parents[2]
ROOT = TRAIN.parents[1]
FILES = {
    ".github/workflows/ci.yml", ".gitignore", "LICENSE", "README.md", "inlay_my_method/__init__.py",
    "pyproject.toml", "tests/golden/TestMyMethod.json", "tests/test_conformance.py",
}  # fmt: skip
FAST = "R08 or R22 or R23 or R26 or R34"


def refused(name: str) -> str:
    """Return the error with which a name is refused."""
    with pytest.raises(InlayError) as caught:
        _named_and_free(name)
    return str(caught.value)


def _named_and_free(name: str) -> None:
    names = named(name)
    check_free(names, imported(rendered(names)[f"{names.package}/__init__.py"]))


@pytest.mark.parametrize(
    ("name", "says", "do"),
    [
        ("My_Method", "this is no name for a method's package", "characters: my-method"),
        ("GatedLoRA", "saw: 'GatedLoRA'", "characters: gated-lo-ra"),
        ("übung", r"saw: '\xfcbung'", "hyphens between, at most 40 characters"),
        ("../x", "this is no name for a method's package", "characters: x"),
        ("a" * 41, "this is no name for a method's package", "such as my-method"),
        ("", "saw: ''", "such as my-method"),
        ("class", "a method cannot be called 'class'\n  saw: it is a word of Python", "another name"),
        ("head", "saw: a command takes this word for something else", "another name"),
        ("kit-x", "the conformance kit's own methods begin with 'kit_'", "another name"),
        ("method", "a class Method, which hides what it imports", "method-tuning"),
        ("output", "a class OutputDelta, which hides", "output-tuning"),
        ("exception", "a class Exception, which hides what it imports or Python's own", "exception-tuning"),
        ("lora", "the method 'lora' exists\n  saw: inlay-lora 0.1.0 offers it here", "uninstall inlay-lora"),
        ("inlay-dora", "the method 'dora' exists", "choose another name, or uninstall inlay-lora"),
        (
            "train",
            "a package is called inlay-train already\n  saw: inlay-train 0.1.0 is installed",
            "another",
        ),
    ],
)
def test_a_name_is_refused(name: str, says: str, do: str) -> None:
    assert says in refused(name)
    assert do in refused(name).partition("do: ")[2]


def test_a_method_of_ours_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [p for p in sys.path if "site-packages" not in p])
    text = refused("lora")
    assert "saw: inlay-lora offers it; it is not installed here" in text
    assert "who has both packages could use neither method" in text


def test_a_module_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inlay_taken.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert "a module is called inlay_taken already, and would hide the new one" in refused("taken")
    assert f"saw: {tmp_path / 'inlay_taken.py'}" in refused("taken")


def test_the_names_are_made_from_one() -> None:
    assert Names("my-method") == named("my-method") == named("inlay-my-method")
    assert Names("p3-tuning").plain() == {
        "distribution": "inlay-p3-tuning", "package": "inlay_p3_tuning", "id": "p3_tuning",
        "class": "P3Tuning",
    }  # fmt: skip


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    for taken in (tmp_path, tmp_path / "mine"):
        with pytest.raises(InlayError, match="the output is not a new or empty folder") as caught:
            create(Names("my-method"), taken)
        assert str(taken) in caught.value.saw
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_files_are_written_all_or_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(InlayError, match="the package cannot be written") as caught:
            _write({"sub/a": "1", "b": "2", "b/c": "3"}, folder)
        assert caught.value.saw.startswith(str(folder / "b"))
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InlayError, match="the package cannot be written") as caught:
        create(Names("my-method"), tmp_path / "file" / "x")
    assert str(tmp_path / "file") in caught.value.saw


def test_no_template_leaves_something_to_do() -> None:
    for path, text in rendered(Names("my-method")).items():
        if path != "LICENSE":
            assert not [word for word in ("TODO", "FIXME", "<<", ">>", "{%") if word in text], path
    assert rendered(Names("x"))["LICENSE"] == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("name", ["x", "my-method", "a-name-of-forty-characters-for-a-method0"])
def test_what_is_written_is_good_style(tmp_path: Path, name: str) -> None:
    create(Names(name), tmp_path / "p")
    for command in (["check", "--extend-select", "E,W,I,B,UP,N"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=tmp_path / "p", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


def test_the_command_says_what_it_wrote_and_what_to_do_next(
    inlay: Callable[..., Any], tmp_path: Path
) -> None:
    told = inlay("new", "my-method")
    assert told.status == 0, told.err
    assert "inlay-my-method: the package inlay-my-method with the method my_method (MyMethod)" in told.words
    assert 'pip install -e ".[test]"' in told.out
    assert "inlay check inlay-my-method" in told.out
    again = inlay("new", "my-method")
    assert (again.status, again.out) == (1, "")
    assert "the output is not a new or empty folder" in again.err
    plain = inlay("new", "my-method", "--output", "other", "--json").json
    assert plain["folder"] == "other"
    assert plain["class"] == "MyMethod"
    assert set(plain["files"]) == FILES
    assert plain["next"][0] == "cd other"
    for folder in ("inlay-my-method", "other"):
        written = {p.relative_to(tmp_path / folder).as_posix() for p in (tmp_path / folder).rglob("*")}
        assert {p for p in written if (tmp_path / folder / p).is_file()} == FILES


def test_the_templates_are_in_the_wheel(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=TRAIN, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {p for p in zipfile.ZipFile(wheel).namelist() if "/templates/" in p}
    there = {p.relative_to(TRAIN).as_posix() for p in TEMPLATES.rglob("*") if p.is_file()}
    assert held == there
    assert len(held) == len(FILES)


def python(environment: Path, *arguments: str, folder: Path, **variables: str) -> str:
    """Run the environment's Python; return what it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "INLAY_", "PYTEST_"))}
    kept |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(environment / "bin" / "python"), *arguments], cwd=folder, env={**kept, **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a fresh environment, which sees this one's packages, and a new package installed in it."""
    home = tmp_path_factory.mktemp("new")
    create(Names("my-method"), home / "project")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "env")], check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(home / "env")}))
    here = sysconfig.get_path("purelib")
    (own / "others.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    install = ["-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
    python(home / "env", *install, folder=home / "project")
    return home / "env", home / "project"


def test_the_new_package_keeps_rules_and_its_golden_file_is_what_the_kit_writes(
    installed: tuple[Path, Path],
) -> None:
    environment, project = installed
    golden = project / "tests" / "golden" / "TestMyMethod.json"
    before = golden.read_text()
    told = python(environment, "-m", "pytest", "-q", "-k", FAST, folder=project, INLAY_WRITE_GOLDEN="1")
    assert "5 passed" in told
    assert golden.read_text() == before


def test_the_new_package_is_listed(installed: tuple[Path, Path]) -> None:
    environment, project = installed
    listed = json.loads(python(environment, "-m", "inlay_train", "methods", "--json", folder=project))
    mine = next(entry for entry in listed["installed"] if entry["method"] == "my_method")
    assert mine["package"] == "inlay-my-method"
    assert mine["what"] == tomllib.loads((project / "pyproject.toml").read_text())["project"]["description"]


@pytest.mark.slow
def test_the_new_package_keeps_every_rule(installed: tuple[Path, Path]) -> None:
    """By its own tests, and by the command that checks it, which finds them."""
    environment, project = installed
    assert " passed" in python(environment, "-m", "pytest", "-q", folder=project)
    found = json.loads(
        python(environment, "-m", "inlay_train", "check", "my_method", "--json", folder=project)
    )
    assert found["good"]
    assert found["counts"] == {"passed": 36, "failed": 0, "excused": 0, "unchecked": 0, "other": 1}
    assert found["classes"] == "tests/test_conformance.py of its editable install"
    assert found["derived"] == {}
