"""torch's parametrizations and weight norm, below an adapter (before attaching) and above it (after)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import inlay
from inlay.errors import AttachError, CannotMerge
from inlay.testing.models import batch_for
from inlay.testing.snapshots import differences, snapshot
from inlay.testing.tools import distance, lively, shake

pytest.importorskip("transformers")

CLOSE = 1e-5
STACKS = {
    "lora": "lora(rank=4, targets=['query'])",
    "ia3": "ia3(targets=['query', 'value'])",
    "dora": "lora(rank=2, targets=['query']) + dora(rank=2, targets=['query'])",
    "bitfit": "bitfit(targets=['query'])",
    "trained": "trained(targets=['query'])",
}


class Doubled(nn.Module):
    """A parametrization: W = 2·original."""

    def forward(self, original: Tensor) -> Tensor:
        return 2 * original


def old_weight_norm(module: nn.Module) -> None:
    """The deprecated way: a hook computes `weight`, a plain attribute, before each forward."""
    torch.nn.utils.weight_norm(module)


BELOW = {
    "weight_norm": weight_norm,
    "old weight_norm": pytest.param(
        old_weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm")
    ),
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
}
EVERY_WAY = pytest.mark.parametrize("below", list(BELOW.values()), ids=list(BELOW))


def queries(model: nn.Module) -> list[nn.Module]:
    return [layer.attention.self.query for layer in model.bert.encoder.layer]


def computed(below: Any) -> nn.Module:
    """Return a lively model whose query weights are computed by `below`."""
    model = lively("bert")
    for query in queries(model):
        below(query)
    return model


def plain_like(model: nn.Module) -> nn.Module:
    """Return a lively model with ordinary query weights, equal to what `model` computes."""
    plain = lively("bert")
    for ordinary, query in zip(queries(plain), queries(model), strict=True):
        ordinary.weight.data.copy_(query.weight.detach())
    return plain


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@EVERY_WAY
@pytest.mark.parametrize("stack", STACKS)
def test_adapters_act_on_a_computed_weight_as_on_an_ordinary_one(stack: str, below: Any) -> None:
    model = computed(below)
    batch = batch_for(model, labels=True)
    base, before = logits(model, batch), snapshot(model)
    plain = plain_like(model)
    for adapted in (model, plain):
        inlay.attach(adapted, STACKS[stack], seed=1)
        shake(adapted)
    expected = logits(plain, batch)
    assert distance(logits(model, batch), expected) < CLOSE
    assert distance(expected, base) > 0.01
    model(**batch).loss.backward()
    inlay.check_training(model)
    model.zero_grad()
    inlay.detach(model)
    assert [d for d in differences(before, model) if "weight" not in d] == []
    assert torch.equal(logits(model, batch), base)


def test_a_weight_below_that_changes_is_followed() -> None:
    """DoRA keeps the weight it reads; what it is computed from may change without its address changing."""
    model = computed(weight_norm)
    inlay.attach(model, STACKS["dora"], seed=1)
    shake(model)
    batch = batch_for(model)
    before = logits(model, batch)
    with torch.no_grad():
        for query in queries(model):
            query.parametrizations.weight.original1 += torch.randn(
                32, 32, generator=torch.Generator().manual_seed(1)
            )
    plain = plain_like(model)
    inlay.attach(plain, STACKS["dora"], seed=1)
    for (_, _, p), (_, _, q) in zip(
        plain._inlay_state.own_parameters(), model._inlay_state.own_parameters(), strict=True
    ):
        p.data.copy_(q.data)
    assert distance(logits(model, batch), logits(plain, batch)) < CLOSE
    assert distance(logits(model, batch), before) > 0.01


@EVERY_WAY
def test_merging_into_a_computed_weight_is_refused(below: Any) -> None:
    model = computed(below)
    inlay.attach(model, STACKS["lora"])
    shake(model)
    before = snapshot(model)
    with pytest.raises(CannotMerge, match=r"self\.query: its weight is computed by a parametrization"):
        inlay.merge(model)
    assert [d for d in differences(before, model) if "weight" not in d] == []


@pytest.mark.parametrize("stack", STACKS)
def test_a_parametrization_above_acts_and_must_go_before_detaching(stack: str) -> None:
    model = lively("bert")
    batch, untouched = batch_for(model), snapshot(model)
    base = logits(model, batch)
    inlay.attach(model, STACKS[stack], seed=1)
    shake(model)
    adapted = logits(model, batch)
    query = queries(model)[1]
    before = snapshot(query)
    weight_norm(query)  # computes the weight it found, so nothing may change
    assert distance(logits(model, batch), adapted) < CLOSE
    name = r"bert\.encoder\.layer\.1\.attention\.self\.query"
    with pytest.raises(
        AttachError, match=rf"changed its class(.|\n)*{name} is now .*ParametrizedLinear"
    ) as caught:
        inlay.detach(model)
    assert "remove_parametrizations" in str(caught.value)
    assert distance(logits(model, batch), adapted) < CLOSE
    parametrize.remove_parametrizations(query, "weight")
    assert type(query) is before.modules[""].kind
    inlay.detach(model)
    assert [d for d in differences(untouched, model) if "query" not in d and "state_dict" not in d] == []
    assert distance(logits(model, batch), base) < CLOSE  # weight norm itself rounds


def test_saving_and_loading_over_a_parametrization(tmp_path: Path) -> None:
    model = computed(weight_norm)
    inlay.attach(model, STACKS["lora"])
    shake(model)
    batch = batch_for(model)
    inlay.save(model, tmp_path)
    fresh = computed(weight_norm)
    inlay.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, batch), logits(model, batch))
