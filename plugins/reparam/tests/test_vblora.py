"""VB-LoRA: sub-vectors written out one by one, the shared bank, the compact form, counts, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import agrees
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.errors import ConfigError, TrainingError
from inlay.stack import need_state
from inlay.testing.layers import deltas_of, fit, gradients, settled
from inlay.testing.models import batch_for, build
from inlay.testing.tools import distance, shake
from inlay_reparam import VBLoRA

QUERY = "bert.encoder.layer.0.attention.self.query"


def adapter_of(model: nn.Module) -> Any:
    (found,) = need_state(model).placed.values()
    return found.adapter


def bank_of(model: nn.Module) -> Tensor:
    found: Tensor = adapter_of(model).shared["common"]["bank"]
    return found


def mixed(logits: Tensor, bank: Tensor, top: int) -> Tensor:
    """One sub-vector: the softmax of the `top` largest logits alone, times their vectors."""
    order = logits.argsort(descending=True)[:top]
    weights = logits[order].exp() / logits[order].exp().sum()
    found = torch.zeros_like(bank[0])
    for weight, index in zip(weights, order, strict=True):
        found = found + weight * bank[index]
    return found


@pytest.mark.parametrize("top", [1, 2, 6])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_layer_is_its_dense_form(family: str, top: int) -> None:
    """With top_k = num_vectors a dense softmax."""
    model = settled(family)

    def written(delta: Any, weight: Tensor) -> Tensor:
        bank = bank_of(model)
        down = [torch.cat([mixed(part, bank, top) for part in row]) for row in delta.down.logits]
        up = [torch.cat([mixed(tile[r], bank, top) for tile in delta.up.logits]) for r in range(2)]
        return weight + torch.stack(up, dim=1) @ torch.stack(down)

    method = VBLoRA(rank=2, num_vectors=6, vector_length=8, top_k=top, targets=("query", "value", "down"))
    if top > 1:
        agrees(model, method, written)
    else:  # a softmax of one is 1: its logits get no gradient, whose distance would be 0 / 0
        inlay.attach(model.double(), method, seed=0)
        shake(model)
        for delta in deltas_of(model).values():
            change = written(delta, torch.zeros((), dtype=torch.float64))
            assert distance(delta.product(bank_of(model)), change) < 1e-12  # type: ignore[operator]


def test_with_one_vector_every_sub_vector_is_it() -> None:
    model = settled("bert")
    inlay.attach(model, VBLoRA(num_vectors=1, vector_length=8, top_k=1, targets=("query",)))
    delta: Any = deltas_of(model)[QUERY]
    down, up = delta.factors(bank_of(model)).down, delta.factors(bank_of(model)).up
    assert torch.equal(down, bank_of(model)[0].repeat(4, 4))
    assert torch.equal(up.T, bank_of(model)[0].repeat(4, 4))


def test_the_weights_sum_to_one_and_gradients_reach_only_what_is_chosen() -> None:
    model = settled("bert")
    inlay.attach(model, VBLoRA(rank=1, num_vectors=64, vector_length=32, targets=("query",), layers=[0]))
    shake(model)
    mixture: Any = deltas_of(model)[QUERY].down
    indices, weights = mixture.selected()
    assert indices.shape == weights.shape == (1, 1, 2)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 1))
    found = gradients(model, batch_for(model, labels=True))
    (bank,) = (g for n, g in found.items() if n.endswith(".bank"))
    chosen = {*indices.flatten().tolist(), *deltas_of(model)[QUERY].up.selected()[0].flatten().tolist()}  # type: ignore[union-attr, operator]
    assert set(bank.any(dim=1).nonzero().flatten().tolist()) == chosen
    (logits,) = (g for n, g in found.items() if n.endswith("down.logits"))
    assert int(logits.count_nonzero()) == 2


def test_one_bank_for_all_layers_learns_at_a_rate_of_its_own() -> None:
    model = settled("bert")
    inlay.attach(model, VBLoRA(num_vectors=8, vector_length=8))
    assert len([n for n, p in model.named_parameters() if p.shape == (8, 8)]) == 1
    logits, bank = inlay.parameter_groups(model, lr=1e-2)
    assert (logits["lr"], bank["lr"]) == pytest.approx((1e-2, 1e-3))
    assert [p is bank_of(model) for p in bank["params"]] == [True]
    assert len(logits["params"]) == 2 * 2 * 2


def test_the_spread_of_the_start() -> None:
    """Entries of ΔW have std 7e-5·√r: 1.4e-4 with rank 4; small, and not 0."""
    model = nn.Sequential(nn.Linear(768, 768))
    inlay.attach(model, VBLoRA(targets=("0",)))
    delta: Any = deltas_of(model)["0"]
    assert float(delta.product(torch.zeros(())).detach().std()) == pytest.approx(1.4e-4, rel=0.15)
    assert not VBLoRA.starts_as_identity


def test_counts_while_training_and_stored(tmp_path: Path) -> None:
    """RoBERTa-base, q and v, h = 90, b = 256, r = 4: logits dominate while training, the bank once stored."""
    with torch.device("meta"):
        model = build("roberta", hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    pieces = 24 * 4 * (768 + 768) // 256
    assert inlay.plan(model, VBLoRA(num_vectors=90)).parameters == 90 * 256 + 90 * pieces
    small = settled("bert")
    inlay.attach(small, VBLoRA(num_vectors=16, vector_length=8), seed=0)
    inlay.advance(small, "default")
    held = adapter_of(small).tensors()
    pieces = 4 * 4 * (32 + 32) // 8
    assert sum(t.numel() * t.element_size() for t in held.values()) == 4 * (16 * 8 + pieces) + 2 * pieces


@pytest.mark.parametrize("top", [1, 2, 3])
def test_advancing_keeps_what_is_chosen_and_nothing_else(top: int, tmp_path: Path) -> None:
    model = settled("bert")
    inlay.attach(model, VBLoRA(num_vectors=16, vector_length=8, top_k=top, bound=0.5), "fr", seed=0)
    shake(model)
    batch = batch_for(model, labels=True)
    before = model(**batch).logits
    assert inlay.advance(model, "fr") is None
    assert distance(model(**batch).logits, before) < 1e-5
    inlay.save(model, tmp_path)
    fresh = settled("bert")
    inlay.load(fresh, tmp_path, "fr")
    names = {n.rpartition(".")[2] for n in adapter_of(fresh).tensors()}
    assert names == {"bank", "indices", "weights"}
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    assert inlay.merge(fresh).worst < 1e-5


def test_what_is_chosen_cannot_be_trained_on(tmp_path: Path) -> None:
    model = settled("bert")
    inlay.attach(model, VBLoRA(num_vectors=16, vector_length=8), "fr", seed=0)
    inlay.advance(model, "fr")
    inlay.save(model, tmp_path)
    fresh = settled("bert")
    inlay.load(fresh, tmp_path, "fr")
    with pytest.raises(TrainingError, match="nothing learns"):
        inlay.parameter_groups(fresh)
    with pytest.raises(TrainingError, match="nothing learns"):
        inlay.check_training(fresh)


def test_sizes_that_do_not_fit_are_refused_with_those_that_would() -> None:
    with pytest.raises(
        ConfigError, match=r"vector_length does not divide(?s:.*)=12;(?s:.*)\(16, 32\)(?s:.*)1, 2, 4, 8, 16"
    ):
        inlay.attach(build("llama"), VBLoRA(vector_length=12, targets=("value",)))
    with pytest.raises(ConfigError, match=r"top_k is larger than what it is(?s:.*)top_k=5; num_vectors=4"):
        VBLoRA(num_vectors=4, top_k=5)


def test_dropout_acts_on_what_is_read() -> None:
    model = settled("bert")
    inlay.attach(model, VBLoRA(num_vectors=8, vector_length=8, dropout=0.5, targets=("query",)), seed=0)
    shake(model)
    layer, delta = model.get_submodule(QUERY), deltas_of(model)[QUERY].train()
    x = torch.randn(4, 32)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    expected = F.linear(x, layer.weight, layer.bias) + F.dropout(x, 0.5) @ delta.product(x).T  # type: ignore[operator]
    assert distance(y, expected) < 1e-6


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_learns(family: str) -> None:
    model = settled(family, hidden_size=128, intermediate_size=128)
    inlay.attach(model, VBLoRA(num_vectors=64, vector_length=32, targets=("linear",)), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True), steps=100)
    assert before > 0.5
    assert after < 0.1 * before
    inlay.check_training(model)
