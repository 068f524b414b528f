"""Rules over larger stacks: all subsets of what merges, and random ordered subsets of everything."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from inlay.testing import RULES, Case, Joined, Member, Rule
from inlay.testing.cases import stacks
from inlay.testing.conformance import collect
from inlay.testing.profiles import profile

ROOT = Path(__file__).parents[2]
METHODS = collect(ROOT.glob("plugins/*/tests/test_conformance.py"))
FIRST = {joined.kind.id: joined for joined in reversed(METHODS)}  # one of each method, as first declared
STACKED = [rule for rule in RULES.values() if not (rule.alone or rule.once)]

# What merges on BERT (and, but for bitfit and ssf's norms, on Llama), with a small setting of each.
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2}, "dora": {"rank": 2}, "ia3": {}, "ssf": {}, "bitfit": {}, "ln_tuning": {},
}  # fmt: skip
SUBSETS = [s for size in range(2, len(SMALL) + 1) for s in itertools.combinations(SMALL, size)]


def small(name: str) -> Member:
    joined = FIRST[name]
    return Member(name, joined.kind(**SMALL[name]), joined)


@pytest.mark.parametrize("number", ["R09", "R11"])
@pytest.mark.parametrize("size", range(2, len(SMALL) + 1))
def test_all_subsets_merge(size: int, number: str) -> None:
    """Every subset of the methods with a weight form merges exactly, in a shuffled order, and unmerges."""
    shuffle = random.Random(size).shuffle
    chosen = [list(s) for s in SUBSETS if len(s) == size]
    for turn, names in enumerate(chosen):
        shuffle(names)
        family = ("bert", "gpt2", "vit")[turn % 3]
        RULES[number](Case(family, torch.float32, tuple(map(small, names)), turn % 5))
    assert chosen


@pytest.mark.parametrize("rule", STACKED, ids=lambda rule: rule.number)
def test_any_stack(rule: Rule) -> None:
    """Random ordered subsets of three to all methods, on whatever family all of them know."""
    several: list[Joined] = list(FIRST.values())
    concerns = {"merging": Case.merging, "lasting": Case.lasting}.get(rule.concerns, lambda case: True)

    @profile(0.7)
    @given(case=stacks(several, rule=rule).filter(concerns))
    def check(case: Case) -> None:
        rule(case)

    check()
