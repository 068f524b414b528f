"""BitFit: which biases learn, counts of the published models, folding, and that it learns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import inlay
from inlay.errors import ConfigError, TargetError
from inlay.testing.layers import deltas_of, fit, settled
from inlay.testing.models import batch_for, build
from inlay.testing.tools import distance, shake
from inlay_selective import BitFit

BIASED = ["gpt2", "bert", "roberta", "vit", "qwen"]


def bert_on_meta(size: str) -> nn.Module:
    large = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(**(large if size == "large" else {})))


def bias_names(model: nn.Module) -> set[str]:
    """Return every bias term of a model but those of its head."""
    return {n for n, _ in model.named_parameters() if n.endswith(".bias") and not n.startswith("classifier")}


@pytest.mark.parametrize("family", BIASED)
@torch.no_grad()
def test_all_means_every_bias_but_the_heads_and_starts_at_the_base(family: str) -> None:
    model = build(family)
    biases, batch = bias_names(model), batch_for(model)
    before = model(**batch).logits
    inlay.attach(model, BitFit())
    assert {site.split("[")[0] + ".bias" for site in deltas_of(model)} == biases
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("family", BIASED)
@torch.no_grad()
def test_output_is_that_of_the_model_with_those_biases(family: str) -> None:
    model = settled(family)
    expected, batch = copy.deepcopy(model), batch_for(model)
    before = model(**batch).logits
    inlay.attach(model, BitFit(), seed=0)
    shake(model)
    for site, delta in deltas_of(model).items():
        path, _, role = site.partition("[")
        bias = expected.get_submodule(path).bias
        third = {"": slice(None), "query]": slice(0, 32), "key]": slice(32, 64), "value]": slice(64, 96)}[
            role
        ]
        bias[third] += delta.bias
    assert distance(model(**batch).logits, expected(**batch).logits) < 1e-6
    assert distance(model(**batch).logits, before) > 0.05
    inlay.merge(model, undo=False)
    merged = model.state_dict()
    assert merged.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(merged[name], tensor, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize(
    ("size", "terms", "count"),
    [("base", ["all"], 102_912), ("large", ["all"], 272_384), ("base", ["query", "up"], 46_080)],
)
def test_counts(size: str, terms: list[str], count: int) -> None:
    assert inlay.plan(bert_on_meta(size), BitFit(terms=terms)).parameters == count


def test_the_head_is_trained_beside_it() -> None:
    model = bert_on_meta("base")
    assert inlay.plan(model, BitFit(), train=("head",)).parameters == 102_912 + 2 * 768 + 2


def test_training_moves_nothing_but_the_chosen_biases() -> None:
    model = settled("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inlay.attach(model, BitFit(terms=["query"]), seed=0)
    fit(model, batch_for(model, labels=True), steps=3)
    inlay.merge(model, undo=False)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {f"bert.encoder.layer.{i}.attention.self.query.bias" for i in (0, 1)}


def key_to_query(model: nn.Module, attention: str, key: str, query: str) -> float:
    """Return the gradient of the key bias as a share of the query bias's."""
    inlay.attach(model, BitFit(terms=["query", "key"]), seed=0)
    model(**batch_for(model, labels=True)).loss.backward()
    deltas = deltas_of(model)
    return float(
        deltas[f"{attention}.{key}"].bias.grad.norm() / deltas[f"{attention}.{query}"].bias.grad.norm()
    )


def test_the_key_bias_gets_no_gradient_but_under_rotary_positions() -> None:
    assert key_to_query(settled("bert"), "bert.encoder.layer.1.attention.self", "key", "query") < 1e-4
    assert key_to_query(settled("qwen"), "model.layers.1.self_attn", "k_proj", "q_proj") > 1e-2


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_without_biases_is_an_error(family: str) -> None:
    model = build(family)
    with pytest.raises(TargetError, match=r"bitfit does not suit what 'linear' names(.|\n)*no bias terms"):
        inlay.attach(model, BitFit())
    with pytest.raises(TargetError, match="no bias terms"):
        inlay.attach(model, BitFit(targets=["norm"]))


def test_a_term_the_model_lacks_is_an_error() -> None:
    with pytest.raises(TargetError, match="no 'gate' that bitfit could act on"):
        inlay.attach(build("bert"), BitFit(terms=["query", "gate"]))


@pytest.mark.parametrize("settings", [{"terms": []}, {"terms": ["query"], "targets": ["up"]}])
def test_terms_and_targets_exclude_each_other(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"saw: terms=\[.*\], targets="):
        BitFit(**settings)


def test_an_unknown_term_is_an_error() -> None:
    with pytest.raises(ConfigError, match="intermediate"):
        BitFit(terms=["intermediate"])


def test_layers_and_targets() -> None:
    model = build("bert")
    plan = inlay.plan(model, BitFit(layers=[1], targets=["*.attention.*"]))
    assert {s.name.rpartition("attention.")[2] for s in plan.parts[0].sites} == {
        "self.query", "self.key", "self.value", "output.dense", "output.LayerNorm",
    }  # fmt: skip
    assert inlay.plan(model, BitFit(layers=[1])).parameters == 7 * 32 + 48


def test_no_weight_decay() -> None:
    model = build("bert")
    inlay.attach(model, BitFit())
    assert [g["weight_decay"] for g in inlay.parameter_groups(model)] == [0.0]


@pytest.mark.parametrize(("family", "fraction"), [("gpt2", 0.8), ("bert", 0.3), ("vit", 0.2)])
def test_it_learns(family: str, fraction: float) -> None:
    model = settled(family)
    inlay.attach(model, BitFit(), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert before > 0.5
    assert after < fraction * before
    inlay.check_training(model)
