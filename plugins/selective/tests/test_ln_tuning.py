"""LN tuning: which norms learn, counts of the published models, folding, and that it learns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import inlay
from inlay.errors import ConfigError, TargetError
from inlay.testing.layers import deltas_of, fit, settled, watch
from inlay.testing.models import FAMILIES, batch_for, build
from inlay.testing.tools import distance, shake
from inlay_selective import LNTuning

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip


def bert_on_meta(size: str) -> nn.Module:
    large = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(**(large if size == "large" else {})))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_starts_exactly_at_the_base(family: str) -> None:
    model = build(family)
    batch = batch_for(model)
    model(**batch)  # T5 notes a dtype at its first call
    before = model(**batch).logits
    inlay.attach(model, LNTuning())
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("terms", [["weight", "bias"], ["weight"], ["bias"]])
@torch.no_grad()
def test_output_is_that_of_the_model_with_those_norms(terms: list[str]) -> None:
    model = settled("bert")
    expected, batch = copy.deepcopy(model), batch_for(model)
    before = model(**batch).logits
    inlay.attach(model, LNTuning(terms=terms), seed=0)
    shake(model)
    for site, delta in deltas_of(model).items():
        for term, change in delta.named_parameters():
            assert term in terms
            getattr(expected.get_submodule(site), term).add_(change)
    assert distance(model(**batch).logits, expected(**batch).logits) < 1e-6
    assert distance(model(**batch).logits, before) > 0.01


def test_a_norm_is_the_formula() -> None:
    model = settled("bert")
    inlay.attach(model, LNTuning(), seed=0)
    shake(model)
    site = "bert.encoder.layer.1.output.LayerNorm"
    x, y = watch(model, site, batch_for(model))
    norm, delta = model.get_submodule(site), deltas_of(model)[site]
    centred = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    assert distance(y, (norm.weight + delta.weight) * centred + norm.bias + delta.bias) < 1e-5


def test_gemmas_gain_counts_from_one() -> None:
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL)).eval()
    inlay.attach(model, LNTuning(), seed=0)
    shake(model)
    site = "model.layers.0.input_layernorm"
    batch = {"input_ids": torch.randint(3, 60, (2, 5))}
    x, y = watch(model, site, batch)
    norm, delta = model.get_submodule(site), deltas_of(model)[site]
    assert distance(y, (1 + norm.weight + delta.weight) * F.rms_norm(x, (32,), eps=norm.eps)) < 1e-5
    before = model(**batch).logits.detach()
    inlay.merge(model, undo=False)
    assert distance(model(**batch).logits, before) < 1e-6


@pytest.mark.parametrize(
    ("size", "settings", "count"),
    [
        ("large", {"include_embedding_norm": False}, 98_304),
        ("large", {}, 100_352),
        ("base", {}, 38_400),
        ("base", {"terms": ["weight"]}, 19_200),
    ],
)
def test_counts_of_bert(size: str, settings: dict[str, Any], count: int) -> None:
    assert inlay.plan(bert_on_meta(size), LNTuning(**settings)).parameters == count


@pytest.mark.parametrize(("final", "count"), [(True, 175_104), (False, 172_032)])
def test_counts_of_llama_3b(final: bool, count: int) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24,
                                             num_key_value_heads=8))  # fmt: skip
    assert inlay.plan(model, LNTuning(include_final_norm=final)).parameters == count


def test_norms_on_single_heads_are_left_out() -> None:
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL))
    sites = {s.name.rpartition(".")[2] for s in inlay.plan(model, LNTuning()).parts[0].sites}
    assert sites == {"input_layernorm", "post_attention_layernorm", "norm"}
    assert any(n.endswith("q_norm") for n, _ in model.named_modules())


def test_training_moves_nothing_but_norms() -> None:
    model = settled("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inlay.attach(model, LNTuning(), seed=0)
    fit(model, batch_for(model, labels=True), steps=3)
    inlay.merge(model, undo=False)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if "LayerNorm" in k}


@torch.no_grad()
def test_two_adapters_coexist_with_one_active() -> None:
    model = settled("bert")
    batch = batch_for(model)
    inlay.attach(model, LNTuning(), "a", seed=0)
    shake(model, "a")
    alone = model(**batch).logits
    inlay.attach(model, LNTuning(), "b", seed=1)
    shake(model, "b", seed=1)
    with inlay.use(model, "a"):
        assert torch.equal(model(**batch).logits, alone)
    with inlay.use(model, "b"):
        assert distance(model(**batch).logits, alone) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_merge_and_unmerge(family: str) -> None:
    model = settled(family)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    objects = {n: id(p) for n, p in model.named_parameters()}
    batch = batch_for(model)
    inlay.attach(model, LNTuning(), seed=0)
    shake(model)
    adapted = model(**batch).logits
    inlay.merge(model)
    assert distance(model(**batch).logits, adapted) < 1e-6
    inlay.unmerge(model)
    assert torch.equal(model(**batch).logits, adapted)
    inlay.detach(model)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
    assert {n: id(p) for n, p in model.named_parameters()} == objects


def test_biases_alone_need_norms_that_have_them() -> None:
    with pytest.raises(TargetError, match="ln_tuning does not suit what 'norm' names"):
        inlay.attach(build("llama"), LNTuning(terms=["bias"]))


def test_no_terms_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"nothing would learn\n  saw: terms=\[\]"):
        LNTuning(terms=[])


def test_no_weight_decay() -> None:
    model = build("bert")
    inlay.attach(model, LNTuning())
    assert [g["weight_decay"] for g in inlay.parameter_groups(model)] == [0.0]


@pytest.mark.parametrize(("family", "fraction"), [("llama", 0.85), ("bert", 0.3), ("vit", 0.2)])
def test_it_learns(family: str, fraction: float) -> None:
    model = settled(family)
    inlay.attach(model, LNTuning(), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert before > 0.5
    assert after < fraction * before
    inlay.check_training(model)
