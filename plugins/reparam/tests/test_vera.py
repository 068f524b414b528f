"""VeRA: equations and gradients against dense weights, the shared pair, the file, counts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import agrees, placed
from torch import Tensor, nn

import inlay
from inlay.stack import need_state
from inlay.testing.layers import fit, gradients, settled
from inlay.testing.models import batch_for, build
from inlay.testing.tools import shake
from inlay_reparam import VeRA

QUERY = "bert.encoder.layer.0.attention.self.query"
EVERY = ("query", "value", "down")


def pair_of(model: nn.Module, name: str = "default") -> Any:
    (found,) = need_state(model).find(name)
    return found.adapter.shared["common"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_layer_is_its_dense_form(family: str) -> None:
    model = settled(family)

    def written(delta: Any, weight: Tensor) -> Tensor:
        pair = pair_of(model)
        A, B = pair.A[:, : weight.shape[1]], pair.B[: weight.shape[0]]
        return weight + torch.diag(delta.lambda_b) @ B @ torch.diag(delta.lambda_d) @ A

    agrees(model, VeRA(rank=5, targets=EVERY), written)


def test_the_pair_is_drawn_as_published() -> None:
    """U(±√(6 / fan_in)) from torch's generator seeded with the key, A before B, of the largest sizes."""
    model = build("llama")
    inlay.attach(model, VeRA(rank=4, key=7, targets=EVERY), seed=5)
    generator = torch.Generator().manual_seed(7)
    bound = (6 / 48) ** 0.5
    A = torch.empty(4, 48).uniform_(-bound, bound, generator=generator)
    bound = (6 / 4) ** 0.5
    B = torch.empty(32, 4).uniform_(-bound, bound, generator=generator)
    assert torch.equal(pair_of(model).A, A)
    assert torch.equal(pair_of(model).B, B)


def test_one_frozen_pair_for_all_layers() -> None:
    model = build("llama")
    plan = inlay.attach(model, VeRA(rank=4, targets=EVERY))
    sizes = [(s.in_features, s.out_features) for s in plan.parts[0].sites]
    assert sizes == [(32, 32), (32, 16), (48, 32)] * 2
    assert plan.parameters == sum(4 + rows for _, rows in sizes)
    pairs = [m for m in model.modules() if type(m).__name__ == "Projections"]
    assert len(pairs) == 1
    assert not list(pairs[0].parameters())


def test_the_first_gradient_reaches_lambda_b_alone_and_the_pair_stays() -> None:
    model = settled("llama")
    inlay.attach(model, VeRA(rank=4, targets=EVERY), seed=0)
    before = copy.deepcopy(pair_of(model))
    found = gradients(model, batch_for(model, labels=True))
    assert found
    for name, gradient in found.items():
        assert bool(gradient.any()) == name.endswith("lambda_b"), name
    fit(model, batch_for(model, labels=True), steps=3)
    assert torch.equal(pair_of(model).A, before.A)
    assert torch.equal(pair_of(model).B, before.B)


def test_roberta_base_has_43008_parameters_at_rank_1024() -> None:
    with torch.device("meta"):
        model = build("roberta", hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    assert inlay.plan(model, VeRA(rank=1024)).parameters == 24 * (768 + 1024) == 43_008


@pytest.mark.parametrize("saved", [False, True])
def test_the_file_holds_the_pair_once_or_not_at_all(saved: bool, tmp_path: Path) -> None:
    """At rank 256 on layers of 128 features the pair alone is 256 KiB; the vectors are 6 KiB."""
    model = settled("bert", hidden_size=128)
    inlay.attach(model, VeRA(key=3, save_projection=saved), seed=0)
    shake(model)
    inlay.save(model, tmp_path)
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert (size > 256 * 1024) is saved
    assert saved or size < 16 * 1024
    fresh = settled("bert", hidden_size=128)
    inlay.load(fresh, tmp_path)
    batch = batch_for(model)
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    if saved:
        assert torch.equal(pair_of(fresh).A, pair_of(model).A)


def test_a_saved_pair_need_not_be_the_key_s_own(tmp_path: Path) -> None:
    """So a pair that another library or torch drew can be carried in a file."""
    model = settled("bert")
    inlay.attach(model, VeRA(rank=4, save_projection=True), seed=0)
    shake(model)
    with torch.no_grad():
        pair_of(model).A.mul_(-2)
    inlay.save(model, tmp_path)
    fresh = settled("bert")
    inlay.load(fresh, tmp_path)
    assert torch.equal(pair_of(fresh).A, pair_of(model).A)


def test_the_key_and_nothing_else_makes_the_pair() -> None:
    found = []
    for family, key, seed in [("llama", 0, 1), ("gpt2", 0, 2), ("llama", 1, 1)]:
        model = build(family)
        inlay.attach(model, VeRA(rank=4, key=key), seed=seed)
        found.append(pair_of(model).A)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_two_of_them_have_pairs_of_their_own_and_move_with_the_model() -> None:
    model = settled("llama")
    inlay.attach(model, VeRA(rank=4), "fr")
    inlay.attach(model, VeRA(rank=3, key=9), "de")
    assert pair_of(model, "fr").A.shape[0] == 4
    assert pair_of(model, "de").A.shape[0] == 3
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert pair_of(twin, "fr").A.dtype == torch.bfloat16
    assert pair_of(model, "fr").A.dtype == torch.float32


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_learns(family: str) -> None:
    model = settled(family)
    inlay.attach(model, VeRA(targets=("linear",)), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True), steps=100)
    assert before > 0.5
    assert after < 0.1 * before
    assert len(placed(model)) > 4
    inlay.check_training(model)
