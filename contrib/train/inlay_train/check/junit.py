"""A check's results as a JUnit file, as continuous integration reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from inlay_train.check.outcome import Line, Outcome
from inlay_train.known import printable
from inlay_train.refusal import refusal

SKIPPED = {"excused": "excused: ", "unchecked": "not checked: ", "other": "does not apply: "}


def write(outcome: Outcome, path: Path) -> None:
    """Write a test case for each rule and class, and an error for what could not be loaded."""
    suite = ElementTree.Element("testsuite", name=f"inlay check {outcome.target.name}")
    for line in outcome.lines:
        for result in line.results:
            _case(suite, line, result)
    for where, text in outcome.gathered.broken.items():
        case = ElementTree.SubElement(suite, "testcase", classname="inlay", name=printable(where), time="0")
        ElementTree.SubElement(case, "error", message="could not be loaded").text = _text(text)
    counted = {"tests": "testcase", "failures": ".//failure", "errors": ".//error", "skipped": ".//skipped"}
    for name, tag in counted.items():
        suite.set(name, str(len(suite.findall(tag))))
    suite.set("time", f"{outcome.seconds:.3f}")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    try:
        ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise refusal(
            "the JUnit file cannot be written",
            saw=f"{path}: {error.strerror}",
            do="choose another --junit; the check itself was done",
        ) from error


def _case(suite: ElementTree.Element, line: Line, result: Mapping[str, Any]) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=result["class"], name=f"{line.rule} {line.title}",
        time=f"{result.get('seconds', 0.0):.3f}",
    )  # fmt: skip
    if result["outcome"] == "failed":
        found = result["found"]
        element = ElementTree.SubElement(case, "failure", message=_text(found["saw"].partition("\n")[0]))
        said = {"saw": found["saw"], "at": found["at"], "means": line.means, "example": found["example"],
                "usually": line.usually}  # fmt: skip
        element.text = _text("\n".join(f"{name}: {text}" for name, text in said.items() if text))
    elif result["outcome"] in SKIPPED:
        ElementTree.SubElement(case, "skipped", message=_text(SKIPPED[result["outcome"]] + result["reason"]))


def _text(text: str) -> str:
    """Return text that XML can hold."""
    return "\n".join(map(printable, text.splitlines()))
