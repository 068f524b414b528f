"""P-tuning v2 against the paper and its code: counts, starting values, heads, dropout, projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForTokenClassification, BertModel

import inlay
from inlay.stack import need_state
from inlay.testing.effects import output
from inlay.testing.layers import fit
from inlay.testing.models import batch_for, build
from inlay_prefix import PrefixTuning, PTuningV2, fold

DOUBLE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def adapter(model: nn.Module, name: str = "default/p_tuning_v2") -> Any:
    return need_state(model).adapter_of(name)


def test_counts_of_the_paper_on_bert_base() -> None:
    with torch.device("meta"):
        tagger = BertForTokenClassification(BertConfig(num_labels=9))
        encoder = BertModel(BertConfig())
    projected = PTuningV2(length=5, prefix_projection=True)
    assert inlay.plan(tagger, projected, train=("head",)).parameters == 9_860_105
    assert inlay.plan(encoder, PTuningV2()).parameters == 73_728


def test_starting_values() -> None:
    model = build("bert")
    inlay.attach(model, PTuningV2(length=400), seed=0)
    for _, delta in adapter(model).placed:
        for tensor in (delta.key.detach(), delta.value.detach()):
            assert float(tensor.std()) == pytest.approx(0.02, rel=0.05)
            assert abs(float(tensor.mean())) < 1e-3
    inlay.detach(model)
    inlay.attach(model, PTuningV2(length=400, prefix_projection=True), seed=0)
    generator = adapter(model).shared["self"].requires_grad_(False)
    for tensor in (generator.table, generator.down, generator.up):
        assert float(tensor.std()) == pytest.approx(0.02, rel=0.05)
    assert not generator.down_bias.any()
    assert not generator.up_bias.any()


def test_is_prefix_tuning_with_other_defaults() -> None:
    """Equal keys and values give equal outputs; the two methods differ in what makes them."""
    model = build("bert", dtype=torch.float64)
    batch = batch_for(model)
    inlay.attach(model, PTuningV2(), name="v2")
    inlay.attach(model, PrefixTuning(length=4, reparam=False), name="v1")
    for (_, mine), (_, other) in zip(adapter(model, "v2").placed, adapter(model, "v1").placed, strict=True):
        other.key.data, other.value.data = mine.key.data, mine.value.data
    with inlay.use(model, "v2"):
        found = output(model, batch)
    with inlay.use(model, "v1"):
        assert torch.equal(found, output(model, batch))
    with inlay.use(model):
        assert not torch.allclose(found, output(model, batch))


def test_labels_and_logits_keep_their_rows() -> None:
    model = BertForTokenClassification(BertConfig(**build("bert").config.to_dict())).eval()
    inlay.attach(model, PTuningV2(length=6), train=("head",))
    batch = batch_for(model, rows=2, length=5)
    labels = torch.arange(10).view(2, 5) % 3
    output = model(**batch, labels=labels)
    assert output.logits.shape == (2, 5, 3)
    expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    inlay.check_training(model)
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {
        "key", "value", "weight", "bias",
    }  # fmt: skip


def test_output_attentions_keep_their_columns() -> None:
    model = build("bert", attn_implementation="eager")
    inlay.attach(model, PTuningV2())
    weights = model(**batch_for(model), output_attentions=True).attentions
    assert {w.shape for w in weights} == {(3, 4, 7, 7)}
    assert bool((weights[0].sum(-1) < 1).all())


@pytest.mark.parametrize("projection", [False, True])
def test_dropout_is_for_training_only(projection: bool) -> None:
    model = build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = batch_for(model)
    model.train()
    assert torch.equal(output(model, batch), output(model, batch))
    inlay.attach(model, PTuningV2(prefix_projection=projection))
    for p in adapter(model).named_parameters():
        p[1].data *= 50
    assert not torch.equal(output(model, batch), output(model, batch))
    model.eval()
    assert torch.equal(output(model, batch), output(model, batch))


def test_permuting_prefix_tokens_changes_nothing() -> None:
    model = build("bert", dtype=torch.float64)
    inlay.attach(model, PTuningV2(length=5))
    batch = batch_for(model)
    before = output(model, batch)
    for _, delta in adapter(model).placed:
        delta.key.data, delta.value.data = delta.key.data.flip(1), delta.value.data.flip(1)
    torch.testing.assert_close(output(model, batch), before, **DOUBLE)
    delta.key.data = delta.key.data.flip(1)
    assert not torch.equal(output(model, batch), before)


def test_a_projected_prefix_folds_to_the_flat_form() -> None:
    model = build("bert")
    inlay.attach(model, PTuningV2(prefix_projection=True))
    batch = batch_for(model)
    before = output(model, batch)
    fold(model, "default")
    assert torch.equal(output(model, batch), before)
    assert {n.split(".")[-1] for n, _ in adapter(model).named_parameters()} == {"key", "value"}


@pytest.mark.parametrize("projection", [False, True])
def test_it_learns(projection: bool) -> None:
    """Sixty AdamW steps at the method's own rate on one batch, the head frozen."""
    model = build("bert", initializer_range=0.2)  # with 0.02 a random base passes almost nothing on
    inlay.attach(model, PTuningV2(length=16, prefix_projection=projection), seed=0)
    batch = batch_for(model, rows=8, labels=True)
    before, after = fit(model, batch)
    assert after < 0.7 * before
