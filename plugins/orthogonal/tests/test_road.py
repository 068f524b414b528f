"""RoAd: the formula in each variant, composition, rows of a batch, counts, and that it learns."""

from __future__ import annotations

import pytest
import torch
from rotations import SITES, Layer, adapted, check_layer, placed_at, plain
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import fit, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake
from inlay_orthogonal import RoAd

COUNTS = {"road_1": 1, "road_2": 2, "road_4": 4}
EVERY_VARIANT = pytest.mark.parametrize("variant", COUNTS)


def rotation(variant: str, group: int, theta: Tensor, alpha: Tensor, features: int) -> Tensor:
    """Return R (out, out) with h' = R h, entry by entry."""
    r = torch.zeros(features, features, dtype=theta.dtype)
    half = group // 2
    for start in range(0, features, group):
        number = start // group
        for j in range(group):
            if variant == "road_1":
                first = second = number * half + j % half
            elif variant == "road_2":
                first = second = start + j
            else:
                first, second = 2 * start + j, 2 * start + group + j
            other, sign = (j + half, -1) if j < half else (j - half, 1)
            r[start + j, start + j] += alpha[first] * theta[first].cos()
            r[start + j, start + other] += sign * alpha[second] * theta[second].sin()
    return r


@pytest.mark.parametrize("family", SITES)
@EVERY_VARIANT
def test_a_layer_is_the_formula(variant: str, family: str) -> None:
    def change(tensors: dict[str, Tensor], layer: Layer) -> Layer:
        weight, bias = layer
        r = rotation(variant, 8, tensors["angle"], 1 + tensors["scale"], len(weight))
        return r @ weight, None if bias is None else r @ bias

    check_layer(family, lambda role: RoAd(variant=variant, group_size=8, targets=[role]), change)


def test_slices_of_a_fused_projection() -> None:
    model = adapted("gpt2", RoAd(group_size=8, targets=["key"]))
    path = "transformer.h.0.attn.c_attn"
    (delta,) = placed_at(model, f"{path}[key]")
    r = rotation("road_1", 8, delta.angle.detach(), 1 + delta.scale.detach(), 32)
    weight, bias = plain(model.get_submodule(path))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    y = F.linear(x, weight, bias)
    y[..., 32:64] = y[..., 32:64] @ r.T
    assert distance(model.get_submodule(path)(x), y) < 1e-12


def test_turning_alone_keeps_norms() -> None:
    model = nn.Sequential(nn.Linear(5, 8)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    before = model(x)
    inlay.attach(model, RoAd(group_size=4, targets=["0"]))
    (delta,) = placed_at(model, "0")
    with torch.no_grad():
        delta.angle.copy_(torch.arange(4) / 3)
    assert distance(model(x), before) > 0.1
    assert torch.allclose(model(x).norm(dim=1), before.norm(dim=1))


def test_two_add_their_angles_and_multiply_their_scales() -> None:
    def with_(*tensors: tuple[Tensor, Tensor]) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8)).double()
        for number, (angle, scale) in enumerate(tensors):
            inlay.attach(model, RoAd(group_size=4, targets=["0"]), f"a{number}")
            delta = placed_at(model, "0")[-1]
            with torch.no_grad():
                delta.angle.copy_(angle)
                delta.scale.copy_(scale - 1)
        return model(torch.ones(2, 5, dtype=torch.float64))

    one, two = torch.rand(2, 4, dtype=torch.float64), 1 + torch.rand(2, 4, dtype=torch.float64)
    assert distance(with_((one[0], two[0]), (one[1], two[1])), with_((one.sum(0), two.prod(0)))) < 1e-14


def test_an_adapter_for_each_row_of_a_batch() -> None:
    model = settled("bert")
    batch = batch_for(model)
    for name in ("a", "b"):
        inlay.attach(model, RoAd(group_size=8), name)
    shake(model)
    alone = {}
    for name in ("a", "b"):
        with inlay.use(model, name):
            alone[name] = model(**batch).logits
    with inlay.route(model, ["a", "b", "a"]):
        routed = model(**batch).logits
    for row, name in enumerate("aba"):
        assert distance(routed[row], alone[name][row]) < 1e-6


@EVERY_VARIANT
def test_counts(variant: str) -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    method = RoAd(variant=variant, targets=["up"], layers=[0])
    assert inlay.plan(model, method).parameters == COUNTS[variant] * 3072


@pytest.mark.parametrize("size", [64, 5])
def test_groups_that_do_not_fit_are_refused(size: int) -> None:
    reason = "features of an odd group cannot be paired" if size % 2 else "group_size=64 does not divide"
    with pytest.raises(ConfigError, match=reason):
        inlay.attach(settled("bert"), RoAd(group_size=size))


def test_small_turns_survive_in_bfloat16() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    inlay.attach(model, RoAd(group_size=4, targets=["0"]))
    (delta,) = placed_at(model, "0")
    with torch.no_grad():
        delta.scale.fill_(1e-4)
    less, _ = delta.coefficients(torch.zeros(1, dtype=torch.bfloat16))
    assert float((less.detach().float() - 1e-4).abs().max()) < 1e-6


def test_no_weight_decay() -> None:
    model = settled("bert")
    inlay.attach(model, RoAd(group_size=8))
    assert [g["weight_decay"] for g in inlay.parameter_groups(model)] == [0.0]


def test_it_learns() -> None:
    model = settled("bert")
    inlay.attach(model, RoAd(group_size=16, targets=["linear"]), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert after < 0.1 * before
    inlay.check_training(model)
