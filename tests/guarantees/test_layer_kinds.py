"""The rules on other kinds of layer: mixtures of experts, whose matrices are slices of 3-D parameters.

Left out: that every parameter gets a gradient (R07), which experts no token was sent to do not give; and
what merging into bfloat16 costs (R10): its rounding may send a token to another expert.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given

from inlay.testing import RULES, Case, Joined, Rule
from inlay.testing.cases import cases
from inlay.testing.conformance import collect
from inlay.testing.models import EXPERTS
from inlay.testing.profiles import profile

ROOT = Path(__file__).parents[2]
FOUND = collect(ROOT.glob("plugins/*/tests/test_conformance.py"))
# Of each method the first declared; Mixtral's experts have no place for a bias (SSF's β, KAdaptation's c).
FIRST = {j.kind.id: j for j in reversed(FOUND) if not j.adds_biases and j.kind.id != "bitfit"}
LINEAR = [j for j in FIRST.values() if isinstance(j.kind.accepts, frozenset) and "linear" in j.kind.accepts]
TARGETS = (("linear",), ("down", "value"), ("experts",))
ON_EXPERTS = [dataclasses.replace(j, families=tuple(EXPERTS), targets=TARGETS) for j in LINEAR]
CHECKED = [RULES[n] for n in ("R01", "R02", "R04", "R06", "R09", "R11", "R15", "R19", "R20", "R21")]


ASKED = [(rule, joined) for rule in CHECKED for joined in ON_EXPERTS if rule.covers(joined)]


@pytest.mark.parametrize(("rule", "joined"), ASKED, ids=lambda a: getattr(a, "number", None) or a.kind.id)
def test_experts(rule: Rule, joined: Joined) -> None:
    concerns = {"merging": Case.merging, "lasting": Case.lasting}.get(rule.concerns, lambda case: True)

    @profile(0.5)
    @given(
        case=cases(joined, others=ON_EXPERTS, dtypes=rule.dtypes, families=tuple(EXPERTS)).filter(concerns)
    )
    def check(case: Case) -> None:
        rule(case)

    check()
