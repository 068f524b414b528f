"""MiSS: the three modes against dense weights, what they are equal to, counts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_models import agrees
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import deltas_of, fit, gradients, settled
from inlay.testing.models import batch_for, build
from inlay.testing.quantised import packed
from inlay.testing.tools import distance, shake
from inlay_reparam import MiSS

QUERY = "bert.encoder.layer.0.attention.self.query"


def additive(delta: Any, weight: Tensor) -> Tensor:
    """W'[o, i] = W[o, i] + D[i mod r, o mod m]."""
    D = delta.block
    rows = torch.arange(weight.shape[0])[:, None] % D.shape[1]
    return weight + D[torch.arange(weight.shape[1])[None] % D.shape[0], rows]


def tiled(delta: Any, weight: Tensor) -> Tensor:
    """Each r × r tile, one after the other: W' = W + W D_t + D_t."""
    r = delta.block.shape[-1]
    rows = []
    for t, D in enumerate(delta.block):
        tiles = [weight[t * r : (t + 1) * r, k : k + r] for k in range(0, weight.shape[1], r)]
        rows.append(torch.cat([tile + tile @ D + D for tile in tiles], dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "settings",
    [{"rank": 4}, {"rank": 7}, {"rank": 4, "mode": "mini", "mini_rank": 8}, {"rank": 5, "mode": "mini"},
     {"rank": 8, "mode": "bat"}],
    ids=["balance", "balance padded", "mini", "mini padded", "bat"],
)  # fmt: skip
def test_every_layer_is_its_dense_form(family: str, settings: dict[str, Any]) -> None:
    method = MiSS(**settings, targets=("query", "value", "down"))
    agrees(settled(family), method, tiled if method.mode == "bat" else additive)


def attached(**settings: Any) -> tuple[nn.Module, Any]:
    model = settled("bert")
    inlay.attach(model, MiSS(**settings, targets=("query",), layers=[0]), seed=0)
    shake(model)
    return model, deltas_of(model)[QUERY]


def test_a_mini_block_as_wide_as_the_layer_is_the_balanced_one() -> None:
    _, wide = attached(rank=5, mode="mini", mini_rank=32)
    _, balanced = attached(rank=5)
    with torch.no_grad():
        wide.block.copy_(balanced.block)
    x = torch.randn(3, 32)
    assert torch.equal(wide.effect(x), balanced.effect(x))


def test_a_rank_of_the_whole_input_is_a_full_dense_change() -> None:
    _, delta = attached(rank=32)
    assert torch.equal(delta.product(torch.zeros(())), delta.block.T)


def test_its_rank_is_at_most_r() -> None:
    _, delta = attached(rank=6)
    assert torch.linalg.matrix_rank(delta.product(torch.zeros(())).detach()) == 6


def test_gradients_are_there_from_the_first_step() -> None:
    for mode in ("balance", "bat", "mini"):
        model = settled("bert")
        inlay.attach(model, MiSS(rank=8, mode=mode))
        assert all(bool(g.any()) for g in gradients(model, batch_for(model, labels=True)).values())


@pytest.mark.parametrize("mode", ["balance", "bat"])
def test_dropout_acts_on_what_is_read(mode: str) -> None:
    """On x, not on the sum of its pieces: as the published code has it where the two differ."""
    model, delta = attached(rank=8, mode=mode, dropout=0.5)
    delta.train()
    layer, x = model.get_submodule(QUERY), torch.randn(4, 32)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    kept = nn.functional.dropout(x, 0.5)
    written = tiled if mode == "bat" else additive
    change = written(delta, layer.weight) - layer.weight
    assert distance(y, x @ layer.weight.T + layer.bias + kept @ change.T) < 1e-5


def test_bat_multiplies_the_level_below() -> None:
    model = settled("bert")
    below, above = MiSS(rank=5, targets=("query",)), MiSS(rank=8, mode="bat", targets=("query",))
    inlay.attach(model, below.named("below") + above.named("above"), "two", seed=0)
    shake(model)
    layer = model.get_submodule(QUERY)
    level = additive(deltas_of(model, "two/below")[QUERY], layer.weight)
    x = torch.randn(4, 32)
    expected = x @ tiled(deltas_of(model, "two/above")[QUERY], level).T + layer.bias
    assert distance(layer(x), expected) < 1e-5


def test_bat_multiplies_the_weight_that_four_bits_stand_for() -> None:
    model = packed("llama", "nf4", hidden_size=64, intermediate_size=128)
    method = MiSS(rank=8, mode="bat", targets=("output",), layers=[0])
    inlay.attach(model, method, seed=0)
    shake(model)
    path = "model.layers.0.self_attn.o_proj"
    layer, delta = model.get_submodule(path), deltas_of(model)[path]
    import bitsandbytes

    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(4, 64)
    adapted = layer(x)
    with inlay.use(model):
        base = layer(x)
    change = tiled(delta, weight) - weight
    assert distance(adapted - base, x @ change.T) < 1e-4


def test_counts() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
    assert inlay.plan(model, MiSS(targets=("up",))).parameters == 64 * 11_008
    assert inlay.plan(model, MiSS(mode="bat", targets=("up",))).parameters == 64 * 11_008
    assert inlay.plan(model, MiSS(mode="mini", mini_rank=64, targets=("up",))).parameters == 64 * 64


def test_sizes_that_do_not_fit_are_refused_with_those_that_would() -> None:
    model = build("bert")
    with pytest.raises(ConfigError, match=r"rank is larger than what it is(?s:.*)rank=33(?s:.*)at most 32"):
        inlay.attach(model, MiSS(rank=33))
    with pytest.raises(ConfigError, match=r"rank does not divide(?s:.*)rank=5;(?s:.*)1, 2, 4, 8, 16, 32"):
        inlay.attach(model, MiSS(rank=5, mode="bat"))
    with pytest.raises(
        ConfigError, match=r"mini_rank does not divide(?s:.*)mini_rank=3;(?s:.*)1, 2, 4, 8, 16, 32"
    ):
        inlay.attach(model, MiSS(rank=4, mode="mini", mini_rank=3))
    assert not [n for n, _ in model.named_parameters() if "inlay" in n]


@pytest.mark.parametrize("settings", [{}, {"mode": "bat"}, {"mode": "mini", "mini_rank": 16}], ids=str)
def test_it_learns(settings: dict[str, Any]) -> None:
    model = settled("bert")
    inlay.attach(model, MiSS(rank=16, **settings, targets=("attention",)), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True), steps=100)
    assert before > 0.5
    assert after < 0.1 * before
    inlay.check_training(model)
