"""BOFT: permutations, the formula, counts, what fits, and that it learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rotations import SITES, Layer, adapted, check_layer, exact, placed_at, plain, skew_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import fit, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake
from inlay_orthogonal import BOFT, OFT


def permutation(features: int, size: int, i: int) -> list[int]:
    """Return perm_i: in each group of features/(k/2^i), the even half blocks, then the odd ones."""
    group, half = features // ((features // size) >> i), size // 2
    found: list[int] = []
    for start in range(0, features, group):
        halves = [list(range(start + n, start + n + half)) for n in range(0, group, half)]
        found += [f for part in halves[::2] + halves[1::2] for f in part]
    return found


def rotation(triangles: Tensor, features: int, size: int) -> Tensor:
    """Return F_{m−1} … F₀ with F_i = P_i blockdiag(…) P_iᵀ and P_i[j, perm_i[j]] = 1."""
    r = torch.eye(features, dtype=triangles.dtype)
    for i, factor in enumerate(triangles):
        p = torch.zeros(features, features, dtype=triangles.dtype)
        for j, position in enumerate(permutation(features, size, i)):
            p[j, position] = 1
        r = p @ torch.block_diag(*(exact(skew_of(t, size)) for t in factor)) @ p.T @ r
    return r


def test_the_catalogues_permutations() -> None:
    assert permutation(16, 4, 0) == list(range(16))
    assert permutation(16, 4, 1) == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert permutation(16, 4, 2) == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]


@pytest.mark.parametrize(("i", "mixed"), [(0, {0, 1, 2, 3}), (1, {0, 1, 4, 5}), (2, {0, 1, 8, 9})])
def test_what_the_first_block_of_each_factor_mixes(i: int, mixed: set[int]) -> None:
    model = nn.Sequential(nn.Linear(16, 3))
    inlay.attach(model, BOFT(block_size=4, factors=3, targets=["0"]))
    turn = placed_at(model, "0")[1].rotation
    with torch.no_grad():
        turn.skew[i, 0] = 0.3
    change = turn(torch.eye(16))
    assert set(change.any(1).nonzero().flatten().tolist()) == mixed
    assert set(change.any(0).nonzero().flatten().tolist()) == mixed


@pytest.mark.parametrize("family", SITES)
@pytest.mark.parametrize("factors", [1, 2, 3])
def test_a_layer_is_the_formula(factors: int, family: str) -> None:
    def change(tensors: dict[str, Tensor], layer: Layer) -> Layer:
        weight, bias = layer
        turned = weight @ rotation(tensors["skew"], weight.shape[1], 4).T
        return (1 + tensors["scale"])[:, None] * turned, bias

    check_layer(family, lambda role: BOFT(factors=factors, targets=[role]), change)


def test_slices_of_a_fused_projection() -> None:
    model = adapted("gpt2", BOFT(factors=2, targets=["value"]))
    path = "transformer.h.1.attn.c_attn"
    scale, turn = placed_at(model, f"{path}[value]")
    weight, bias = plain(model.get_submodule(path))
    sigma = 1 + scale.scale.detach()
    own = sigma[:, None] * (weight[64:] @ rotation(turn.rotation.skew.detach(), 32, 4).T)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    assert distance(model.get_submodule(path)(x), F.linear(x, torch.cat((weight[:64], own)), bias)) < 1e-12


def test_a_convolution() -> None:
    path = "vit.embeddings.patch_embeddings.projection"
    model = adapted("vit", BOFT(factors=3, targets=["patch_embeddings.projection"]))
    scale, turn = placed_at(model, path)
    conv = model.get_submodule(path)
    turned = conv.weight.flatten(1) @ rotation(turn.rotation.skew.detach(), 48, 4).T
    weight = ((1 + scale.scale.detach())[:, None] * turned).view_as(conv.weight)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert distance(conv(x), F.conv2d(x, weight, conv.bias, stride=conv.stride)) < 1e-12
    inlay.merge(model, undo=False)
    assert distance(model.get_submodule(path).weight, weight) < 1e-12


def test_one_factor_and_no_scale_is_oft() -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    results = []
    for method in (BOFT(block_size=4, targets=["0"]), OFT(block_size=4, cayley="exact", targets=["0"])):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 3)).double()
        inlay.attach(model, method)
        with torch.no_grad():
            placed_at(model, "0")[-1].rotation.skew.copy_(torch.arange(12).view(2, 6) / 10)
        results.append(model(x))
    assert distance(results[0], results[1]) < 1e-14


def test_enough_factors_mix_every_feature_with_every_other_and_turn() -> None:
    model = nn.Sequential(nn.Linear(16, 3)).double()
    inlay.attach(model, BOFT(block_size=4, factors=3, targets=["0"]), seed=0)
    shake(model)
    turn = placed_at(model, "0")[1].rotation
    one = torch.eye(16, dtype=torch.float64)
    r = one + turn(one).detach()
    assert bool((r.abs() > 1e-9).all())
    assert distance(r @ r.T, one) < 1e-12
    assert distance(one + turn(one, back=True), r.T) < 1e-12


def test_counts() -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    one = BOFT(targets=["up"], layers=[0])
    assert inlay.plan(model, one).parameters == 768 * 3 // 2 + 3072
    assert inlay.plan(model, dataclasses.replace(one, factors=4)).parameters == 4 * 768 * 3 // 2 + 3072


def test_factors_that_do_not_fit_are_refused() -> None:
    model = nn.Sequential(nn.Linear(48, 3))
    for method in (BOFT(factors=4, targets=["0"]), BOFT(block_size=3, factors=2, targets=["0"])):
        with pytest.raises(ConfigError, match="butterfly factors do not fit a layer") as error:
            inlay.attach(model, method)
        assert "block_size=4 with up to 3 factors" in error.value.do
    with pytest.raises(ConfigError, match="block_size=5 does not divide the features"):
        inlay.attach(model, BOFT(block_size=5, targets=["0"]))
    inlay.attach(model, BOFT(factors=3, targets=["0"]))


def test_dropout_leaves_blocks_of_one_factor_unturned() -> None:
    model = nn.Sequential(nn.Linear(32, 3))
    inlay.attach(model, BOFT(dropout=0.5, targets=["0"]), seed=0)
    shake(model)
    turn = placed_at(model, "0")[1].rotation
    for training, unturned in ((True, 4), (False, 0)):
        change = turn.train(training)(torch.eye(32))
        assert sum(not change[i : i + 4].any() for i in range(0, 32, 4)) == unturned


def test_no_weight_decay() -> None:
    model = settled("bert")
    inlay.attach(model, BOFT())
    assert [g["weight_decay"] for g in inlay.parameter_groups(model)] == [0.0]


def test_it_learns() -> None:
    model = settled("bert")
    inlay.attach(model, BOFT(targets=["linear"]), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert after < 0.1 * before
    inlay.check_training(model)
