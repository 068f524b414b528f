"""DeLoRA: the normalised product against dense weights, its bound, both starts, the norms it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import agrees
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import deltas_of, fit, gradients, settled
from inlay.testing.models import batch_for, build
from inlay.testing.quantised import packed
from inlay.testing.tools import distance, shake
from inlay_reparam import DeLoRA

QUERY = "bert.encoder.layer.0.attention.self.query"


def dense(down: Tensor, up: Tensor, strength: Tensor, norms: Tensor) -> Tensor:
    """(λ / r) Σ_i b_i a_iᵀ / (‖a_i‖ ‖b_i‖), column j times ν_j."""
    total = torch.zeros(len(up), down.shape[1], dtype=down.dtype)
    for a, b in zip(down, up.T, strict=True):
        total = total + torch.outer(b, a) / (a.norm().clamp(min=1e-4) * b.norm().clamp(min=1e-4))
    return strength / len(down) * total * norms


def written(delta: Any, weight: Tensor) -> Tensor:
    norms = weight.square().sum(0).sqrt()
    change = dense(delta.down, delta.up, delta.strength, norms)
    if delta.subtracts:
        change = change - dense(delta.first_down, delta.first_up, delta.first_strength, norms)
    return weight + change


@pytest.mark.parametrize("start", ["random", "zero"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_layer_is_its_dense_form(family: str, start: Any) -> None:
    """From a model in float64, whose norms are measured in it."""
    method = DeLoRA(rank=3, strength=0.7, start=start, targets=("query", "value", "down"))
    agrees(settled(family).double(), method, written)


def attached(**settings: Any) -> tuple[nn.Module, Any]:
    model = settled("bert")
    inlay.attach(model, DeLoRA(**settings, targets=("query",), layers=[0]), seed=0)
    return model, deltas_of(model)[QUERY]


def test_its_norm_is_at_most_lambda_whatever_the_factors() -> None:
    _, delta = attached(rank=4, strength=2.0, start="zero")
    for size in (1e-2, 1.0, 1e3):
        with torch.no_grad():
            delta.down.normal_(std=size)
            delta.up.normal_(std=size)
            delta.norms.fill_(1)
        assert 0.1 < float(delta.product(torch.zeros(())).detach().norm()) <= 2.0


def test_scaling_a_factor_changes_nothing() -> None:
    model, delta = attached(rank=4, start="zero")
    shake(model)
    before = delta.product(torch.zeros(()))
    with torch.no_grad():
        delta.down.mul_(3)
        delta.up.mul_(0.2)
    assert distance(delta.product(torch.zeros(())), before) < 1e-6


def test_orthonormal_factors_give_lambda_over_the_root_of_r() -> None:
    _, delta = attached(rank=4, strength=3.0, start="zero")
    with torch.no_grad():
        delta.down.copy_(torch.eye(32)[:4])
        delta.up.copy_(torch.eye(32)[:, 7:11])
        delta.norms.fill_(1)
    assert float(delta.product(torch.zeros(())).detach().norm()) == pytest.approx(3 / 4**0.5)


@pytest.mark.parametrize("start", ["random", "zero"])
def test_it_starts_at_the_base_bit_for_bit(start: Any) -> None:
    for family in ("llama", "gpt2", "bert"):
        model = settled(family)
        batch = batch_for(model)
        before = model(**batch).logits
        inlay.attach(model, DeLoRA(start=start), seed=0)
        assert torch.equal(model(**batch).logits, before)


def test_from_zero_the_first_gradient_of_b_is_as_large_as_the_clamp_makes_it() -> None:
    """1 / 1e-4 times what a normalised column gets: why one step goes to full strength."""
    found = {}
    for start in ("random", "zero"):
        model = settled("bert")
        inlay.attach(model, DeLoRA(start=start), seed=0)
        named = gradients(model, batch_for(model, labels=True)).items()
        found[start] = max(float(g.norm()) for n, g in named if n.endswith(".up"))
    assert found["zero"] > 100 * found["random"]


def test_the_first_factors_are_a_copy_and_are_not_saved(tmp_path: Path) -> None:
    """Sharing their storage, as the authors' code does on the CPU, would leave the change 0 for ever."""
    model, delta = attached(rank=4)
    shake(model)
    assert not torch.equal(delta.first_up, delta.up)
    assert sorted(delta.state_dict()) == ["down", "norms", "strength", "up"]
    inlay.save(model, tmp_path)
    fresh = settled("bert")
    inlay.load(fresh, tmp_path)
    assert torch.equal(deltas_of(fresh)[QUERY].first_up, delta.first_up)
    batch = batch_for(model)
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)


def test_norms_of_a_quantised_weight_are_those_of_what_its_bits_stand_for() -> None:
    """peft asks for the norms of the packed bytes (tests/parity/test_reparam_parity.py)."""
    import bitsandbytes

    model = packed("llama", "nf4", hidden_size=64, intermediate_size=128)
    path = "model.layers.0.self_attn.q_proj"
    layer: Any = model.get_submodule(path)
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    inlay.attach(model, DeLoRA(), seed=0)
    norms = deltas_of(model)[path].norms
    assert norms.shape == (64,)
    assert distance(norms, weight.float().norm(dim=0)) < 1e-6
    assert distance(norms, torch.ones(64)) > 0.1


def test_norms_of_a_base_without_weights_come_from_the_file(tmp_path: Path) -> None:
    model, delta = attached(rank=4)
    inlay.save(model, tmp_path)
    with torch.device("meta"):
        empty = build("bert", initializer_range=0.2)
    inlay.load(empty, tmp_path)
    assert torch.equal(deltas_of(empty)[QUERY].norms, delta.norms)


def test_norms_are_of_columns_where_the_weight_is_stored_transposed() -> None:
    model = settled("gpt2")
    inlay.attach(model, DeLoRA(targets=("query",)), seed=0)
    weight = model.get_submodule("transformer.h.0.attn.c_attn").weight
    assert (
        distance(deltas_of(model)["transformer.h.0.attn.c_attn[query]"].norms, weight[:, :32].norm(dim=1))
        < 1e-6
    )


def test_count() -> None:
    with torch.device("meta"):
        model = build("roberta", hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    assert inlay.plan(model, DeLoRA()).parameters == 24 * (8 * (768 + 768) + 1)


def test_the_strength_has_a_rate_of_its_own() -> None:
    model = build("bert")
    inlay.attach(model, DeLoRA(strength_lr_ratio=3.0))
    factors, strengths = inlay.parameter_groups(model, lr=1e-3)
    assert (factors["lr"], strengths["lr"]) == pytest.approx((1e-3, 3e-3))
    assert strengths["weight_decay"] == 0
    assert all(p.shape == (1,) for p in strengths["params"])


def test_a_rank_larger_than_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank is larger than what it is(?s:.*)rank=33(?s:.*)at most 32"):
        inlay.attach(build("bert"), DeLoRA(rank=33))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_learns(family: str) -> None:
    model = settled(family)
    inlay.attach(model, DeLoRA(targets=("linear",)), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True), steps=100)
    assert before > 0.5
    assert after < 0.1 * before
    inlay.check_training(model)
