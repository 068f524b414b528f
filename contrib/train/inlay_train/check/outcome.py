"""What a check came to: a line for each rule, over all conformance classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inlay_train.check.engine import Gathered
from inlay_train.check.target import Target

WORDS = {"failed": "FAILED", "excused": "excused", "unchecked": "not checked", "passed": "passed",
         "other": "does not apply"}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One rule: what was found for each class, the gravest first in `WORDS` being the rule's outcome."""

    rule: str
    title: str
    means: str
    usually: str
    results: Sequence[Mapping[str, Any]]

    @property
    def outcome(self) -> str:
        there = {result["outcome"] for result in self.results}
        return next((word for word in WORDS if word in there), "other")

    def reasons(self) -> dict[str, list[str]]:
        """Return the classes by the reason why the rule was not simply checked; failures are told apart."""
        found: dict[str, list[str]] = {}
        for result in self.results:
            if result["outcome"] == self.outcome and self.outcome in ("excused", "unchecked", "other"):
                found.setdefault(result["reason"], []).append(result["class"])
        return found

    def failures(self) -> list[Mapping[str, Any]]:
        return [result for result in self.results if result["outcome"] == "failed"]


@dataclass(frozen=True)
class Outcome:
    """A whole check."""

    target: Target
    gathered: Gathered
    profile: str
    processes: int
    seconds: float

    @property
    def lines(self) -> list[Line]:
        by_rule: dict[str, list[Any]] = {number: [] for number in sorted(self.gathered.rules)}
        for result in self.gathered.results:
            by_rule[result["rule"]].append(result)
        return [Line(number, **self.gathered.rules[number], results=sorted(results, key=_by_class))
                for number, results in by_rule.items()]  # fmt: skip

    @property
    def counts(self) -> dict[str, int]:
        """Return how many rules came to what."""
        found = [line.outcome for line in self.lines]
        return {word: found.count(word) for word in ("passed", "failed", "excused", "unchecked", "other")}

    @property
    def good(self) -> bool:
        """Whether something was checked and nothing failed."""
        return bool(self.counts["passed"]) and not self.counts["failed"] and not self.gathered.broken

    @property
    def derived(self) -> dict[str, dict[str, Any]]:
        """Return what was derived for methods without a conformance class, by class."""
        found = {name: kind["derived"] for name, kind in self.gathered.classes.items()}
        return {name: facts for name, facts in found.items() if facts is not None}

    def plain(self) -> dict[str, Any]:
        """Return everything as plain data."""
        keys = ("class", "method", "outcome", "reason", "seconds", "found")
        return {
            "target": self.target.name, "package": self.target.package, "version": self.target.version,
            "good": self.good, "classes": self.target.whence, "derived": self.derived,
            "profile": self.profile, "processes": self.processes, "seconds": round(self.seconds, 1),
            "counts": self.counts, "broken": self.gathered.broken,
            "rules": [
                {"rule": line.rule, "title": line.title, "outcome": line.outcome,
                 "results": [{k: result[k] for k in keys if k in result} for result in line.results]}
                for line in self.lines
            ],
        }  # fmt: skip


def _by_class(result: Mapping[str, Any]) -> str:
    return str(result["class"])
