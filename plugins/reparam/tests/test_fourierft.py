"""FourierFT: cosines written out one by one, both ways to apply them, the places, counts, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import agrees
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.errors import ConfigError
from inlay.stack import need_state
from inlay.testing.layers import deltas_of, fit, settled
from inlay.testing.models import batch_for, build
from inlay.testing.tools import distance, shake
from inlay_reparam import FourierFT

QUERY = "bert.encoder.layer.0.attention.self.query"


def places(out: int, width: int, count: int, seed: int = 777) -> tuple[Tensor, Tensor]:
    order = torch.randperm(out * width, generator=torch.Generator().manual_seed(seed))[:count]
    return order // width, order % width


def written(scaling: float, seed: int = 777) -> Any:
    """W' with ΔW[p, q] = scaling / (out·in) Σ_k c_k cos(2π (u_k p / out + v_k q / in))."""

    def changed(delta: Any, weight: Tensor) -> Tensor:
        out, width = weight.shape
        p = torch.arange(out, dtype=torch.float64)[:, None] / out
        q = torch.arange(width, dtype=torch.float64)[None] / width
        total = torch.zeros_like(weight)
        for c, u, v in zip(delta.spectrum, *places(out, width, len(delta.spectrum), seed), strict=True):
            total = total + c * torch.cos(2 * math.pi * (u * p + v * q))
        return weight + scaling / (out * width) * total

    return changed


@pytest.mark.parametrize("count", [1, 2, 40], ids=["sparse", "sparse or dense", "dense"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_layer_is_its_dense_form(family: str, count: int) -> None:
    method = FourierFT(n_frequency=count, scaling=60.0, seed=3, targets=("query", "value", "down"))
    agrees(settled(family), method, written(60.0, seed=3))


@pytest.mark.parametrize("shape", [(45, 33), (64, 50), (51, 80)], ids=str)
@pytest.mark.parametrize("count", [4, 300], ids=["sparse", "dense"])
def test_sizes_may_be_odd(shape: tuple[int, int], count: int) -> None:
    """At 300 places some lie on every edge, where a real transform has no imaginary part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    agrees(model, FourierFT(n_frequency=count, scaling=400.0, targets=("0",)), written(400.0))


@pytest.mark.parametrize("shape", [(9, 7), (8, 6), (8, 7), (9, 6), (1, 5), (5, 1)], ids=str)
def test_each_place_gives_its_cosine_both_ways(shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).double()
    count = shape[0] * shape[1]
    inlay.attach(model, FourierFT(n_frequency=count, scaling=1.0, targets=("0",)))
    delta: Any = deltas_of(model)["0"]
    x = torch.eye(shape[1], dtype=torch.float64)
    for k in range(count):
        with torch.no_grad():
            delta.spectrum.copy_(torch.eye(count)[k])
            expected = written(1.0)(delta, torch.zeros(shape, dtype=torch.float64))
            assert torch.allclose(delta.product(x), expected, atol=1e-12)
            assert torch.allclose(delta.grid.module.sparse(x, delta.spectrum), expected.T, atol=1e-12)


def test_few_frequencies_never_form_the_weight() -> None:
    model = settled("bert", hidden_size=64)
    inlay.attach(model, FourierFT(n_frequency=8, targets=("query",)))
    delta: Any = deltas_of(model)[QUERY]
    assert delta.grid.module.few
    delta.grid.module.dense = None  # calling it would fail
    x = torch.randn(3, 64)
    assert delta.effect(x).shape == (3, 64)


def test_half_precision_computes_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = settled("bert", hidden_size=64).to(dtype)
        inlay.attach(model, FourierFT(n_frequency=8, targets=("query",)))
        delta: Any = deltas_of(model)[QUERY]
        assert delta.spectrum.dtype == dtype
        x = torch.randn(3, 64).to(dtype)
        found = delta.effect(x)
        assert found.dtype == dtype
        assert distance(found.float(), F.linear(x.float(), delta.product(torch.zeros(())))) < 1e-2


def test_linear_in_the_coefficients() -> None:
    model = settled("bert")
    inlay.attach(model, FourierFT(n_frequency=30, targets=("query",)))
    delta: Any = deltas_of(model)[QUERY]
    before = delta.product(torch.zeros(()))
    with torch.no_grad():
        delta.spectrum.mul_(3)
    assert distance(delta.product(torch.zeros(())), 3 * before) < 1e-6


def test_zeros_start_at_the_base_and_the_default_does_not() -> None:
    model = settled("bert", hidden_size=64)
    batch = batch_for(model)
    before = model(**batch).logits
    inlay.attach(model, FourierFT(n_frequency=100, init="zeros"), "zeros")
    assert torch.equal(model(**batch).logits, before)
    inlay.attach(model, FourierFT(n_frequency=100), "normal")
    assert distance(model(**batch).logits, before) > 1e-3
    assert FourierFT(init="zeros").starts_as_identity
    assert not FourierFT().starts_as_identity


def test_the_spread_of_the_default_start() -> None:
    """scaling·√(n/2) / (out·in): 5.7e-3 on a square layer of 768 features."""
    model = nn.Sequential(nn.Linear(768, 768))
    inlay.attach(model, FourierFT(targets=("0",)))
    delta: Any = deltas_of(model)["0"]
    assert float(delta.product(torch.zeros(())).detach().std()) == pytest.approx(5.7e-3, rel=0.1)


def test_one_grid_for_all_layers_of_a_shape_drawn_from_the_seed(tmp_path: Path) -> None:
    model = settled("llama")
    inlay.attach(model, FourierFT(n_frequency=20, targets=("attention", "down")), seed=4)
    (found,) = need_state(model).placed.values()
    shapes = {name: grid.shape for name, grid in found.adapter.shared.items()}
    assert sorted(shapes.values()) == [(16, 32), (32, 32), (32, 48)]
    assert len({id(d.grid.module) for d in deltas_of(model).values()}) == 3
    assert not [k for k in found.adapter.tensors() if k.startswith("shared")]
    shake(model)
    inlay.save(model, tmp_path)
    fresh = settled("llama")
    inlay.load(fresh, tmp_path)
    batch = batch_for(model)
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)


def test_roberta_base_has_24000_parameters() -> None:
    with torch.device("meta"):
        model = build("roberta", hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    assert inlay.plan(model, FourierFT(n_frequency=1000)).parameters == 24_000


def test_more_frequencies_than_entries_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"n_frequency is larger than what it(?s:.*)1025(?s:.*)at most 1024"
    ):
        inlay.attach(build("bert"), FourierFT(n_frequency=1025))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_learns(family: str) -> None:
    model = settled(family)
    inlay.attach(model, FourierFT(n_frequency=200, scaling=20.0, targets=("linear",)), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True), steps=100)
    assert before > 0.5
    assert after < 0.1 * before
    inlay.check_training(model)
