"""The pytest plugin of `inlay check`: chooses the kit's tests, shares them out, tells results as they come.

Several processes collect the same tests. Each goes through them from a place of its own and claims a
test by making a file, so that none runs twice and a process that crashes loses one test only.
"""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Generator, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from inlay.errors import InlayError
from inlay.testing import RULES, MethodConformance, Rule

UNDECLARED = {
    "R08": "its parameter count is not declared: a conformance class of its own would do that",
    "R34": "no golden file of its format is declared: a conformance class of its own would do that",
}
UNNEEDED = "[XPASS(strict)]"
NUMBER = re.compile(r"test_(R\d\d)_")


class Reporter:
    """Writes events, a line of JSON each, to `events`; `task` is what `engine` asks this process to do."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self.rules, self.methods = set(task["rules"]), set(task["methods"])
        self.claims = Path(task["claims"])
        self.file = Path(task["events"]).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the process
        self.started = 0.0

    def tell(self, event: str, **what: Any) -> None:
        self.file.write(json.dumps({"event": event, **what}) + "\n")
        self.file.flush()

    # -- what there is to run --------------------------------------------------------------------

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        self.tell("collecting", where=collector.nodeid)

    def pytest_exception_interact(self, node: pytest.Item | pytest.Collector, call: Any, report: Any) -> None:
        """Tell of a file that could not be imported."""
        if isinstance(node, pytest.Collector):
            error = call.excinfo.value
            text = str(error) if isinstance(error, InlayError) else str(report.longrepr)
            self.tell("broken", where=node.nodeid, text=text)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the kit's tests of the rules and methods asked for, by rule."""
        kept, unchecked = [], []
        for item in items:
            kind, number = getattr(item, "cls", None), NUMBER.match(item.name)
            if number is None or kind is None or not issubclass(kind, MethodConformance):
                continue
            wanted = not self.methods or kind.method.id in self.methods
            if wanted and hasattr(kind, "derived") and number[1] in UNDECLARED:
                unchecked.append(item)
            elif wanted:
                kept.append(item)
        classes = list(dict.fromkeys(item.cls for item in [*kept, *unchecked]))  # type: ignore[attr-defined]
        items[:] = sorted((i for i in kept if self._asked(i)), key=rule_of)
        self.tell(
            "collected",
            rules={
                r.number: {"title": r.title, "means": r.means, "usually": r.usually} for r in self._rules()
            },
            classes={kind.__name__: _described(kind) for kind in classes},
            items=[_plain(item) for item in items],
            unknown=sorted(self.rules - RULES.keys()),
            skipped=[*self._undeclared(unchecked), *self._not_concerned(classes)],
        )

    def _asked(self, item: pytest.Item) -> bool:
        return not self.rules or rule_of(item) in self.rules

    def _rules(self) -> list[Rule]:
        return [rule for rule in RULES.values() if not self.rules or rule.number in self.rules]

    def _undeclared(self, items: list[pytest.Item]) -> Iterator[dict[str, Any]]:
        for item in filter(self._asked, items):
            yield {**_plain(item), "outcome": "unchecked", "reason": UNDECLARED[rule_of(item)]}

    def _not_concerned(self, classes: list[type[MethodConformance]]) -> Iterator[dict[str, Any]]:
        for kind in classes:
            for rule in self._rules():
                if not rule.covers(kind.joined()):
                    yield {"rule": rule.number, "class": kind.__name__, "method": kind.method.id,
                           "outcome": "other", "reason": _why_not(rule, kind)}  # fmt: skip

    # -- running them ----------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run what no other process has claimed."""
        first = self.task["number"] * len(session.items) // self.task["processes"]
        for item in [*session.items[first:], *session.items[:first]]:
            if self._claim(item):
                self.tell("started", id=item.nodeid)
                session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return True

    def _claim(self, item: pytest.Item) -> bool:
        try:
            (self.claims / sha256(item.nodeid.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Generator[None, Any, Any]:
        """Keep what failed beside pytest's report: rules add notes to errors, and Hypothesis groups them."""
        report = yield
        if call.excinfo is not None and report.failed:
            report.found = failure(call.excinfo.value, item.cls.method)
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "setup":
            self.started = time.monotonic()
        if report.when == "call" or report.outcome != "passed":
            outcome, reason = self._judged(report)
            self.tell(
                "result", id=report.nodeid, outcome=outcome, reason=reason,
                seconds=time.monotonic() - self.started, found=getattr(report, "found", None),
            )  # fmt: skip

    def _judged(self, report: Any) -> tuple[str, str]:
        """Return the outcome in this program's words, and the reason of an excuse or a skip.

        An excuse that was not needed fails, unless only the fewest examples were tried.
        """
        if hasattr(report, "wasxfail"):
            return "excused", report.wasxfail
        said = str(report.longrepr)
        if report.failed and said.startswith(UNNEEDED):
            reason = said.removeprefix(UNNEEDED).strip()
            if self.task["quick"]:
                return "excused", reason
            report.found = {"saw": f"the rule was kept, but is excused: {reason}", "example": "", "at": ""}
        if report.skipped:
            return "unchecked", str(report.longrepr[2]).removeprefix("Skipped: ")
        return str(report.outcome), ""


def rule_of(item: pytest.Item) -> str:
    """Return the number of the rule that a test is about."""
    found = NUMBER.match(item.name)
    assert found is not None
    return found[1]


def failure(error: BaseException, kind: type) -> dict[str, str]:
    """Return what an error says: its text, the smallest example, and the line of the method's own code."""
    while isinstance(error, BaseExceptionGroup):  # Hypothesis found several
        error = error.exceptions[0]
    notes = "\n".join(getattr(error, "__notes__", []))
    example = re.search(r"^  checked:  (.*)$", notes, re.MULTILINE)
    name = "" if type(error).__name__ in ("RuleBroken", "AssertionError") else f"{type(error).__name__}: "
    return {"saw": f"{name}{error}".strip(), "example": example[1] if example else "",
            "at": _own_line(error, kind)}  # fmt: skip


def _own_line(error: BaseException, kind: type) -> str:
    """Return the innermost line of the traceback that lies in the method's own package."""
    package = kind.__module__.partition(".")[0]
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] == package and not name.startswith("inlay.testing."):
            return f"{frame.f_code.co_filename}:{number}, in {frame.f_code.co_qualname}"
    return ""


def _plain(item: Any) -> dict[str, Any]:
    return {
        "id": item.nodeid,
        "rule": rule_of(item),
        "class": item.cls.__name__,
        "method": item.cls.method.id,
    }


def _described(kind: type[MethodConformance]) -> dict[str, Any]:
    return {"method": kind.method.id, "derived": getattr(kind, "derived", None)}


def _why_not(rule: Rule, kind: type[MethodConformance]) -> str:
    """Say why a rule has nothing to ask of a method."""
    if rule.concerns == "merging" and kind.merges is False:
        return "the method has no weight form"
    if rule.concerns == "lasting" and kind.merges is True:
        return "the method merges everywhere"
    if not rule.among(kind.families):
        return f"the method is not for {', '.join(rule.families or ())}"
    return f"the method does not act on {rule.accepts} sites"
