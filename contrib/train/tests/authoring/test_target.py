"""What `inlay check` is to check: how a target is found, and where its conformance classes are."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest

from inlay.errors import InlayError
from inlay_train.check.target import CLASSES, declared, resolve

Write = Callable[..., Path]
TWO = "[inlay.methods]\nacme = inlay_acme:Acme\nother_acme = inlay_acme:Other\n"


@pytest.fixture
def acme(package: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = package("", entries=TWO)
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.mark.parametrize("text", ["inlay-acme", "Inlay_Acme", "inlay_acme"])
def test_a_package_or_module_means_all_of_its_methods(acme: Path, text: str) -> None:
    found = resolve(text)
    assert (found.package, found.version, found.methods) == ("inlay-acme", "1.0", ("acme", "other_acme"))
    assert (found.paths, found.modules, found.whence) == ((), (), "")


def test_a_method_means_itself(acme: Path) -> None:
    assert resolve("other_acme").methods == ("other_acme",)


def test_what_is_installed_comes_before_a_folder_of_that_name_but_not_before_a_path(
    acme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("inlay-acme", "elsewhere"):
        (tmp_path / name).mkdir()
    assert resolve("inlay-acme").package == "inlay-acme"
    for text in ("./inlay-acme", "elsewhere"):
        found = resolve(text)
        assert (found.package, found.methods) == ("", ())
        assert found.paths == (str(tmp_path / text),)


def test_an_editable_install_has_its_projects_tests(acme: Path, tmp_path: Path) -> None:
    project = tmp_path / "a project"
    said = {"url": project.as_uri(), "dir_info": {"editable": True}}
    file = acme / "inlay_acme-1.0.dist-info" / "direct_url.json"
    file.write_text(json.dumps(said))
    assert declared(distribution("inlay-acme")) == ((), (), "")  # there are none
    (project / "tests").mkdir(parents=True)
    tests = project / "tests" / "test_conformance.py"
    tests.touch()
    whence = "tests/test_conformance.py of its editable install"
    assert declared(distribution("inlay-acme")) == ((str(tests),), (), whence)
    for other in ({**said, "dir_info": {}}, {**said, "url": "https://example.org/x.whl"}):
        file.write_text(json.dumps(other))
        assert declared(distribution("inlay-acme")) == ((), (), "")


def test_modules_offered_under_the_entry_points_come_first(acme: Path) -> None:
    info = acme / "inlay_acme-1.0.dist-info"
    (info / "entry_points.txt").write_text(f"{TWO}[{CLASSES}]\nany = inlay_acme.kept\n")
    whence = "inlay_acme.kept (its entry points 'inlay.conformance')"
    assert declared(distribution("inlay-acme")) == ((), ("inlay_acme.kept",), whence)


@pytest.mark.parametrize(
    ("text", "what", "saw", "do"),
    [
        ("other_acm", "no installed package, module or method", "'other_acm'", "did you mean 'other_acme'"),
        ("p_tuning_v3\n", "and no file or folder, is called so", r"'p_tuning_v3\n'", "did you mean"),
        ("", "no installed package, module or method", "''", "choose among"),
        ("./nowhere", "there is no such file or folder", "'./nowhere'", "name a test file or folder"),
        ("test_x.py", "there is no such file or folder", "'test_x.py'", "or an installed package"),
        (
            "packaging",
            "the package packaging offers no method",
            "no entry point in the group",
            "`inlay methods`",
        ),
    ],
)
def test_what_is_not_found(acme: Path, text: str, what: str, saw: str, do: str) -> None:
    with pytest.raises(InlayError) as caught:
        resolve(text)
    assert what in caught.value.what
    assert saw in caught.value.saw
    assert do in caught.value.do


def test_what_is_known_but_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    for text in ("inlay-lora", "dora"):
        with pytest.raises(InlayError) as caught:
            resolve(text)
        assert caught.value.do == "pip install inlay-lora"


def test_a_method_of_two_packages(acme: Path, package: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(package(name="other-acme"))
    with pytest.raises(InlayError, match="'acme' is offered by several packages") as caught:
        resolve("acme")
    assert caught.value.saw == "inlay-acme and other-acme"
    assert "inlay itself uses neither" in caught.value.do
