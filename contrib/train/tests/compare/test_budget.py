"""Sizes that meet a budget: the largest that fit, or an error that names the nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import inlay
from inlay import InlayError
from inlay_train.compare.budget import fitted, largest, written

STACKS = (
    "lora", 'lora(targets=["linear"], alpha=4.0)', "serial_adapter", "p_tuning_v2", "lora + serial_adapter",
    'ia3 + lora.named("a") + lora(targets=["up"]).named("b")', "p_tuning_v2 + lora + parallel_adapter",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))


@given(slope=st.integers(1, 1000), offset=st.integers(0, 10**6), budget=st.integers(0, 10**9))
def test_the_largest_count_within_a_budget(slope: int, offset: int, budget: int) -> None:
    calls = []

    def count(n: int) -> int:
        calls.append(n)
        return offset + slope * n

    n = largest(count, budget)
    assert n >= 1
    assert n == 1 or count(n) <= budget
    assert n >= 2**19 or count(n + 1) > budget
    assert len(calls) < 50


@pytest.mark.parametrize("stack", STACKS)
@settings(max_examples=8, deadline=None)
@given(budget=st.integers(1, 100_000))
def test_a_stack_meets_its_budget_or_the_error_names_what_is_near(
    model: nn.Module, stack: str, budget: int
) -> None:
    try:
        text = fitted(model, stack, budget)
    except InlayError as error:
        unmet = error
    else:
        unmet = None
    if unmet is not None:
        nearest = int(unmet.do.split()[1])
        again = inlay.plan(model, fitted(model, stack, nearest)).parameters
        assert f"a budget of {budget:,} parameters" in unmet.what
        assert 0.9 * nearest <= again <= nearest
        return
    plan = inlay.plan(model, text)
    assert 0.9 * budget <= plan.parameters <= budget
    assert [p.part.name for p in plan.parts] == [p.part.name for p in inlay.plan(model, stack).parts]


def test_settings_that_were_given_are_kept(model: nn.Module) -> None:
    assert fitted(model, 'lora(targets=["query"], alpha=4.0, rank=9)', 400) == (
        "lora(targets=['query'], rank=3, alpha=4.0)"
    )


def test_a_stack_without_a_size_cannot_meet_a_budget(model: nn.Module) -> None:
    with pytest.raises(
        InlayError, match=r"no size of ia3 meets .* 5,000 .*\n.*ia3 has no size to choose: 256"
    ):
        fitted(model, "ia3", 5_000)


def test_sizes_that_are_too_coarse_are_named(model: nn.Module) -> None:
    with pytest.raises(
        InlayError, match=r"lora with rank=1: 256 and rank=2: 512 parameters\n.*--budget 256 "
    ):
        fitted(model, "lora", 300)


@pytest.mark.parametrize("stack", STACKS)
def test_written_stacks_are_read_back_as_they_were(model: nn.Module, stack: str) -> None:
    parts = [p.part for p in inlay.plan(model, stack).parts]
    text = " + ".join(written(part.name, part.method) for part in parts)
    assert [p.part for p in inlay.plan(model, text).parts] == parts
