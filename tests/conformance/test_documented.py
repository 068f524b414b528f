"""docs/conformance.md lists exactly the kit's rules, in the kit's words; the class keeps its promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import strategies as st

from inlay.testing import RULES, Joined, MethodConformance
from inlay.testing.neighbours import KitLowRank
from inlay.testing.rule import need, raises, rule

TEXT = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()


def test_the_page_lists_the_rules() -> None:
    assert re.findall(r"^## (R\d\d)$", TEXT, re.MULTILINE) == list(RULES) == sorted(RULES)


@pytest.mark.parametrize("number", RULES)
def test_the_page_says_what_a_rule_says(number: str) -> None:
    listed, section = RULES[number], TEXT.split(f"## {number}\n")[1].split("\n## R")[0]
    assert f"**{listed.title}.**" in section
    assert listed.means[0].upper() + listed.means[1:] in section
    assert f"If it fails, usually: {listed.usually}" in section


def test_the_page_lists_what_is_declared() -> None:
    rows = set(re.findall(r"^\| `(\w+)", TEXT, re.MULTILINE))
    declared = {name for name in vars(MethodConformance) if not name.startswith("_") and name != "joined"}
    assert rows == declared | {"method", "configurations"}
    assert rows - {"method", "excused"} == set(Joined.__dataclass_fields__) - {"kind", "name"}


def test_every_rule_becomes_a_test() -> None:
    class TestSmall(MethodConformance):
        method = KitLowRank
        configurations = st.builds(KitLowRank)
        merges = True

    held = {name.split("_")[1] for name in vars(TestSmall) if name.startswith("test_R")}
    assert held == RULES.keys() - {"R14"}


def test_rules_cannot_be_overridden() -> None:
    with pytest.raises(TypeError, match="TestSmall overrides test_R01_starts_unchanged; use excused"):

        class TestSmall(MethodConformance):
            method = KitLowRank
            configurations = st.builds(KitLowRank)

            def test_R01_starts_unchanged(self) -> None: ...


def test_excuses_name_rules() -> None:
    with pytest.raises(TypeError, match="TestSmall excuses 'R99', which is no rule"):

        class TestSmall(MethodConformance):
            method = KitLowRank
            configurations = st.builds(KitLowRank)
            excused = {"R99": "no reason"}


def test_the_count_must_be_given() -> None:
    with pytest.raises(NotImplementedError, match="give the documented parameter count"):
        MethodConformance.parameters(KitLowRank(), [])


def test_two_rules_cannot_share_a_number() -> None:
    with pytest.raises(
        ValueError, match="two rules are called R01: The output is unchanged at the start and Twice"
    ):
        rule("R01", "Twice", means="", usually="")(lambda case: None)


def test_need_and_raises() -> None:
    with pytest.raises(AssertionError, match="it differs by 3"):
        need(False, "it differs by 3")
    with pytest.raises(AssertionError, match="merging raised nothing; expected ValueError"):
        raises(ValueError, lambda: None, "merging")
