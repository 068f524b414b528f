"""The rules about what a stack does, over ordered pairs of the methods that our packages offer.

All pairs in the long profile; by default each method below one other, another one for each rule, and once
below itself: n² pairs of dozens of methods take hours.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.registry import registry
from inlay.testing import RULES, Case, Joined, Rule
from inlay.testing.cases import FAMILIES, members
from inlay.testing.conformance import collect
from inlay.testing.profiles import NAME, profile

ROOT = Path(__file__).parents[2]
JOINED = collect(ROOT.glob("plugins/*/tests/test_conformance.py"))
METHODS = list({j.kind.id: j for j in reversed(JOINED)}.values())[::-1]  # one of each, as first declared
# The rules that order matters to; test_subsets.py holds random stacks to all of them.
PAIRED = [RULES[n] for n in ("R01", "R02", "R04", "R06", "R09", "R11", "R15", "R20", "R21")]


@st.composite
def pair(draw: st.DrawFn, inner: Joined, outer: Joined, rule: Rule, turn: int) -> Case | None:
    """Draw `outer` above `inner` on a family both know, another one for each pair; None if there is none."""
    families = [f for f in FAMILIES if f in inner.families and f in outer.families]
    if not families or (inner.replaces and outer.replaces):  # the upper would hide the lower: refused
        return None
    family = families[turn % len(families)]
    stack = (draw(members(inner, "inner", family)), draw(members(outer, "outer", family)))
    dtype = getattr(torch, rule.dtypes[turn % len(rule.dtypes)])
    case = Case(family, dtype, stack, turn % 7)
    concerns = {"merging": case.merging(), "lasting": case.lasting()}.get(rule.concerns, True)
    return case if concerns else None


@pytest.mark.parametrize("inner", METHODS, ids=repr)
@pytest.mark.parametrize("rule", PAIRED, ids=lambda rule: rule.number)
def test_every_pair(rule: Rule, inner: Joined) -> None:
    """`inner` below itself and others."""
    start = METHODS.index(inner) * len(METHODS) + PAIRED.index(rule)
    strategies = [pair(inner, outer, rule, start + i) for i, outer in above(inner, rule)]
    seen = []

    @settings(profile(), max_examples=1 if NAME == "default" else 5)
    @given(cases=st.tuples(*strategies))
    def check(cases: tuple[Case | None, ...]) -> None:
        for case in cases:
            if case is not None:
                seen.append(case)
                rule(case)

    check()
    assert NAME == "default" or len(seen) > len(METHODS) // 3  # a rule may not concern the one pair


def above(inner: Joined, rule: Rule) -> list[tuple[int, Joined]]:
    """Return the methods to put above one, with their places among all."""
    numbered = list(enumerate(METHODS))
    if NAME != "default":
        return numbered
    own, turn = METHODS.index(inner), PAIRED.index(rule)
    other = numbered[(own + 1 + turn * len(METHODS) // len(PAIRED)) % len(METHODS)]
    return [other, numbered[own]] if turn == own % len(PAIRED) else [other]


def test_every_method_is_held_to_the_rules() -> None:
    """Each method that our packages offer has joined the kit, and so is in every pair."""
    ours = {n for n, found in registry.origins().items() if found[0].distribution.startswith("inlay-")}
    assert ours <= {joined.kind.id for joined in METHODS}
