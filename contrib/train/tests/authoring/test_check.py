"""`inlay check` as a user runs it, on packages that are good, broken, or cannot be loaded at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from inlay.errors import InlayError
from inlay_train.check import command, junit
from inlay_train.check.engine import Gathered
from inlay_train.check.outcome import Outcome
from inlay_train.check.reporter import failure
from inlay_train.check.target import Target, resolve
from inlay_train.cli import app

ENTRY = "[inlay.methods]\nacme = inlay_acme:Acme\n"
Write = Callable[..., Path]
Run = Callable[..., Any]
CRASH = "__import__('os')._exit(7)"


def outcomes(found: dict[str, Any]) -> dict[str, str]:
    return {rule["rule"]: rule["outcome"] for rule in found["rules"]}


def test_a_good_package_of_ours_by_its_own_classes_as_json_and_junit(inlay: Run, tmp_path: Path) -> None:
    done = inlay(
        "check", "inlay-scaling", "--rules", "r22,R23, R26", "--json", "--junit", "out.xml", "--jobs", 1
    )
    assert (done.status, done.err) == (0, "")
    found = done.json
    assert found["good"]
    assert found["package"] == "inlay-scaling"
    assert found["classes"] == "tests/test_conformance.py of its editable install"
    assert (found["derived"], found["broken"]) == ({}, {})
    assert outcomes(found) == {"R22": "passed", "R23": "passed", "R26": "passed"}
    assert [r["class"] for r in found["rules"][0]["results"]] == ["TestIA3", "TestSSF"]
    assert (found["profile"], found["processes"]) == ("quick", 1)
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()[0]
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6", "failures": "0", "errors": "0", "skipped": "0"
    }  # fmt: skip
    assert suite[0].get("name") == "R22 A configuration is data"


@pytest.mark.slow
def test_a_broken_package_by_derived_classes(inlay: Run, package: Write, tmp_path: Path) -> None:
    """Its fold is twice too large. R14 does not apply, R08 and R34 have nothing to be compared with."""
    rules = "R01,R08,R09,R14,R34"
    done = inlay("check", "acme", "--rules", rules, "--junit", "out.xml", path=(package(factor=2),))
    assert done.status == 1
    words = done.words
    assert "inlay-acme 1.0 TestAcme: derived, as no class is declared: 4 configurations, on llama" in words
    assert "merges: yes" in words
    assert "R01 passed" in words
    assert "R08 not checked The parameter count is the documented one its parameter count is not" in words
    assert "R09 FAILED The merged model is the adapted one" in words
    assert "R14 does not apply What cannot merge says so the method merges everywhere" in words
    assert "R34 not checked The format stays no golden file" in words
    report = words.partition("R09 failed: The merged model is the adapted one (TestAcme)")[2]
    assert "saw CannotMerge: the folded layer does not do what the adapted one does" in report
    assert "means in float32 ‖merged − adapted‖ is at most 1e-4 of the effect" in report
    assert (
        "example Case(llama, float32, seed=0: Acme(targets=None, layers=None, rank=1, kind='plain')" in report
    )
    assert "usually the fold is not what forward does" in report
    assert "see docs/conformance.md#r09" in report
    assert "1 of 2 rules passed, 1 failed, 2 not checked, 1 not applicable;" in report
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()[0]
    assert [suite.get(k) for k in ("tests", "failures", "errors", "skipped")] == ["5", "1", "0", "3"]
    (failure,) = suite.findall(".//failure")
    assert "CannotMerge: the folded layer" in str(failure.get("message"))
    assert "usually: the fold is not what forward does" in str(failure.text)
    assert {s.get("message", "").partition(":")[0] for s in suite.findall(".//skipped")} == {
        "not checked", "does not apply"
    }  # fmt: skip


def test_a_package_that_fails_to_import(inlay: Run, package: Write, tmp_path: Path) -> None:
    folder = package("import frobnicate")
    done = inlay("check", "inlay_acme", "--junit", "out.xml", "--jobs", 1, path=(folder,))
    assert done.status == 1
    assert "derived_for_acme.py could not be loaded: method 'acme' failed to import" in done.words
    assert "saw: ModuleNotFoundError: No module named 'frobnicate' in inlay-acme 1.0" in done.words
    assert "nothing was checked" in done.words
    (error,) = ElementTree.parse(tmp_path / "out.xml").getroot().findall(".//error")
    assert "frobnicate" in str(error.text)


def test_a_crash_is_told_and_the_other_rules_are_checked(inlay: Run, package: Write, classes: Path) -> None:
    """A rule excused without need may pass where only few examples are tried; a skip says why."""
    folder = package(factor=CRASH)
    rules = "R01,R08,R09,R22,R23"
    done = inlay("check", classes, "--rules", rules, "--json", "--jobs", 1, path=(folder,))
    assert done.status == 1
    found = done.json
    assert outcomes(found) == {
        "R01": "passed", "R08": "excused", "R09": "failed", "R22": "excused", "R23": "passed"
    }  # fmt: skip
    (crashed,) = found["rules"][2]["results"]
    assert crashed["found"]["saw"] == "the process ended with status 7"
    assert [r["results"][0]["reason"] for r in found["rules"]][1] == "not counted"
    assert found["broken"] == {}


@pytest.mark.slow
def test_an_excuse_without_need_fails_where_more_examples_are_tried(
    inlay: Run, package: Write, classes: Path
) -> None:
    done = inlay(
        "check", classes / "test_acme.py", "--rules", "R22", "--jobs", 1,
        path=(package(),), INLAY_HYPOTHESIS="default",
    )  # fmt: skip
    assert done.status == 1
    assert "saw the rule was kept, but is excused: it is kept all the same" in done.words


def test_classes_offered_under_entry_points(inlay: Run, package: Write, classes: Path) -> None:
    """Of two methods one has a class there; for the other one is derived."""
    methods = "[inlay.methods]\nacme = inlay_acme:Acme\nother = inlay_acme:Other\n"
    folder = package(entries=f"{methods}[inlay.conformance]\nall = acme_kept\n")
    code = (folder / "inlay_acme.py").read_text()
    (folder / "inlay_acme.py").write_text(f'{code}\n\nclass Other(Acme):\n    id: ClassVar[str] = "other"\n')
    (classes / "test_acme.py").rename(folder / "acme_kept.py")
    done = inlay("check", "inlay-acme", "--rules", "R23", "--json", "--jobs", 1, path=(folder,))
    assert done.status == 0, done.err
    assert done.json["classes"] == "acme_kept (its entry points 'inlay.conformance')"
    assert [(r["class"], r["outcome"]) for r in done.json["rules"][0]["results"]] == [
        ("TestAcme", "passed"), ("TestOther", "passed")
    ]  # fmt: skip
    assert list(done.json["derived"]) == ["TestOther"]


@pytest.mark.slow
def test_after_three_crashes_the_rest_is_not_run(inlay: Run, package: Write, classes: Path) -> None:
    folder = package(factor=CRASH)
    done = inlay(
        "check", classes, "--rules", "R01,R09,R10,R11,R12,R23", "--json", "--jobs", 1, path=(folder,)
    )
    assert list(outcomes(done.json).values()) == ["passed", *["failed"] * 5]
    saw = [rule["results"][0]["found"]["saw"] for rule in done.json["rules"][1:]]
    assert saw == [*["the process ended with status 7"] * 3, *["it was not run: 3 processes had crashed"] * 2]


def test_what_keeps_pytest_from_beginning_is_told(inlay: Run, package: Write, classes: Path) -> None:
    (classes / "conftest.py").write_text("raise RuntimeError('no such fixture: teapot')\n")
    done = inlay("check", classes, "--jobs", 1, path=(package(),))
    assert done.status == 1
    assert "pytest could not be loaded:" in done.words
    assert "no such fixture: teapot" in done.words
    assert "nothing was checked" in done.words


def test_a_module_of_classes_that_fails_to_import(inlay: Run, package: Write) -> None:
    folder = package(entries=f"{ENTRY}[inlay.conformance]\nall = acme_kept\n")
    (folder / "acme_kept.py").write_text("import inlay_acme\n\ninlay_acme.missing\n")
    done = inlay("check", "inlay-acme", "--jobs", 1, "--json", path=(folder,))
    assert done.status == 1
    assert (done.json["good"], done.json["rules"]) == (False, [])
    assert "module 'inlay_acme' has no attribute 'missing'" in done.json["broken"]["acme_kept"]


def test_names_and_rules_that_are_not_found_end_without_a_traceback() -> None:
    for arguments, says in {
        ("nothing-such",): "no installed package, module or method, and no file or folder, is called so",
        ("lora", "--rules", "R1"): "a rule cannot be read\n  saw: 'R1'\n  do:  write --rules R01,R09",
    }.items():
        done = CliRunner().invoke(app, ["check", *arguments])
        assert done.exit_code == 1
        assert says in done.output
        assert "Traceback" not in done.output


def test_no_such_rule_and_no_class() -> None:
    target = Target("x")
    with pytest.raises(InlayError, match="there is no rule R98, R99") as caught:
        command._check_found(target, Gathered(unknown={"R99", "R98"}))
    assert caught.value.saw == "--rules for x"
    with pytest.raises(InlayError, match="there is no conformance class") as caught:
        command._check_found(target, Gathered())
    assert "no subclass of MethodConformance in x" in caught.value.saw


def test_the_kits_own_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "NEEDED", ("pytest", "no_such_package"))
    with pytest.raises(InlayError, match="needs packages that are not installed") as caught:
        command.check("x", rules=None, long=False, as_json=False, junit_file=None, jobs=None)
    assert caught.value.saw == "no no_such_package"
    assert caught.value.do == 'pip install "inlay[testing]"'


def test_a_junit_file_that_cannot_be_written(tmp_path: Path) -> None:
    outcome = Outcome(Target("x"), Gathered(broken={"a\x07b": "it\x00"}), "quick", 1, 0.5)
    with pytest.raises(InlayError, match="the JUnit file cannot be written") as caught:
        junit.write(outcome, tmp_path / "no" / "out.xml")
    assert str(tmp_path / "no" / "out.xml") in caught.value.saw
    junit.write(outcome, tmp_path / "out.xml")
    assert ElementTree.parse(tmp_path / "out.xml").getroot()[0][0].get("name") == r"a\x07b"


def test_what_is_told_of_an_error() -> None:
    """The first of several; with the rule's example, and the line of the method's own code."""
    error = ValueError("too large")
    error.add_note("\nrule R01: x\n  checked:  Case(llama)\n  see docs")
    assert failure(ExceptionGroup("several", [error, KeyError("x")]), Target) == {
        "saw": "ValueError: too large", "example": "Case(llama)", "at": ""
    }  # fmt: skip
    with pytest.raises(InlayError) as caught:
        resolve("./nowhere")
    told = failure(caught.value, Target)
    assert told["saw"].startswith("InlayError: there is no such file or folder")
    assert "check/target.py:" in told["at"]
    assert told["at"].endswith(", in _path")


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    test = tmp_path / "test_slow.py"
    test.write_text("import time\n\ntime.sleep(600)\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    task = {
        "paths": [str(test)], "modules": [], "rules": [], "methods": [], "quick": True, "number": 0,
        "processes": 1, "home": str(tmp_path), "confines": str(tmp_path), "claims": str(tmp_path),
        "settings": str(tmp_path / "pytest.ini"), "events": str(tmp_path / "events"),
    }  # fmt: skip
    (tmp_path / "task.json").write_text(json.dumps(task))
    process = subprocess.Popen(
        [sys.executable, "-m", "inlay_train.check.child", str(tmp_path / "task.json")], stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 1
