"""Each rule catches the mistakes it is about: a broken method breaks it, the sound one does not."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import mistakes
import pytest
import torch
from hypothesis import strategies as st
from mistakes import MISTAKES, Broken, Mistake, Mistaken

from inlay.testing import RULES, Case, Joined, Member, Rule
from inlay.testing.rules.format import WRITE

PAGE = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
# No method can break these, only core can; tests/errors and tests/checkpoint hold core to them.
CORE_ALONE = {"R13", "R33"}


def case_of(mistake: Mistake, rule: Rule, **declared: Any) -> Case:
    kind, seen = mistake.kind, {"merges": True, **mistake.declared, **declared}
    joined = Joined(kind, st.builds(kind, how=st.just(mistake.how)), **seen)
    dtype = getattr(torch, rule.dtypes[0])
    family = rule.among(("llama", "bert"))[0]
    return Case(family, dtype, (Member("subject", kind(how=mistake.how), joined),), seed=mistake.seed)


def quietly(rule: Rule, subject: Case | Joined) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rule(subject)


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the golden file of the sound method."""
    monkeypatch.setenv(WRITE, "1")
    RULES["R34"](case_of(Mistake("nothing", "R34", ""), RULES["R34"], golden=tmp_path).members[0].joined)
    monkeypatch.delenv(WRITE)
    assert os.listdir(tmp_path) == ["mistaken.json"]
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.rule}-{m.what}")
def test_the_rule_catches(mistake: Mistake, golden: Path) -> None:
    """A method with the mistake breaks the rule, and the message says which and why."""
    rule = RULES[mistake.rule]
    Broken.scratch.clear()
    case = case_of(mistake, rule, golden=golden)
    with pytest.raises(Exception, match=mistake.says) as caught:
        quietly(rule, case.members[0].joined if rule.once else case)
    assert f"rule {rule.number}: {rule.title}" in "".join(caught.value.__notes__)
    assert rule.usually in "".join(caught.value.__notes__)


@pytest.mark.parametrize("number", [n for n in RULES if n not in ("R14", "R25", "R26")])
def test_the_sound_method_passes(number: str, golden: Path) -> None:
    """The same method without a mistake keeps the rule, so that it was the mistake that broke it."""
    rule = RULES[number]
    case = case_of(Mistake("nothing", number, ""), rule, golden=golden)
    rule(case.members[0].joined if rule.once else case)


def test_every_rule_is_shown_to_catch() -> None:
    assert {m.rule for m in MISTAKES} | CORE_ALONE == RULES.keys()


def test_the_page_lists_every_mistake() -> None:
    """The table of docs/conformance.md is this list: what is wrong, and the rule that says so."""
    rows = re.findall(r"^\| ([^|`]+) \| \[(R\d\d)\]\(#r\d\d\) \|$", PAGE, re.MULTILINE)
    assert rows == [(m.what, m.rule) for m in MISTAKES]
    assert len({m.what for m in MISTAKES}) == len(MISTAKES) >= 25


def test_mistakes_are_made() -> None:
    """Every mistake has a way of its own to be made."""
    source = Path(mistakes.__file__).read_text()
    for mistake in MISTAKES:
        ways = mistake.kind is not Mistaken or mistake.declared or mistake.rule == "R26"
        assert ways or f'"{mistake.how}"' in source.partition("MISTAKES =")[0] or f"_{mistake.how}(" in source
