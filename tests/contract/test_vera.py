"""VeRA on the contract: shared frozen parts, slices of them, folding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from contract_checks import (
    batch_for,
    build,
    check_base_unmoved,
    check_detach,
    check_gradients,
    check_round_trip,
    check_routing,
    gradients,
    logits,
    offered,
    part,
    stir,
)
from rehearsal.vera import VeRA
from torch import nn
from torch.nn import functional as F

import inlay

METHOD = VeRA(rank=4, targets=("query", "value", "down"))


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    with offered(VeRA):
        yield


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_starts_as_the_base_and_matches_the_formula(family: str) -> None:
    """Every site of the model, against a plain torch computation of diag(λ_b) B diag(λ_d) A."""
    model = build(family)
    batch = batch_for(model)
    plain = logits(model, batch)
    inlay.attach(model, METHOD, "fr", seed=0)
    assert torch.equal(logits(model, batch), plain)
    stir(model, "fr", std=1.0)
    reference = build(family)
    generator_A, generator_B = part(model, "fr").adapter.shared["projections"].buffers()
    for site, delta in part(model, "fr").adapter.placed:
        A, B = generator_A[:, : site.in_features], generator_B[: site.out_features]
        change = torch.diag(delta.lambda_b) @ B @ torch.diag(delta.lambda_d) @ A
        module = reference.get_submodule(site.name.split("[")[0])
        start, stop = (site.part.start, site.part.stop) if site.part else (0, site.out_features)
        with torch.no_grad():
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            weight[start:stop] += change
    torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-5, atol=1e-5)
    assert (logits(model, batch) - plain).abs().max() > 1e-3


def test_one_frozen_pair_of_maximal_shape_for_all_sites() -> None:
    model = build("llama")
    plan = inlay.attach(model, METHOD, "fr")
    shared = part(model, "fr").adapter.shared["projections"]
    assert shared.A.shape == (4, 48)
    assert shared.B.shape == (32, 4)
    pairs = [(s.in_features, s.out_features) for s in plan.parts[0].sites]
    assert pairs == [(32, 32), (32, 16), (48, 32)] * 2
    assert plan.parameters == sum(4 + rows for _, rows in pairs)
    copies = [m for m in model.modules() if type(m).__name__ == "Projections"]
    assert copies == [shared]
    assert not list(shared.parameters())
    bound = (6 / 48) ** 0.5
    assert 0.9 * bound < shared.A.abs().max() <= bound


def test_roberta_base_count() -> None:
    """24 · (768 + 1024) = 43,008 at rank 1024 on query and value."""
    with torch.device("meta"):
        model = build("roberta", hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    assert inlay.plan(model, VeRA(rank=1024)).parameters == 43_008


def test_gradients_reach_the_vectors_only() -> None:
    model = build("llama")
    batch = batch_for(model, labels=True)
    inlay.attach(model, METHOD, "fr", seed=0)
    first = gradients(model, batch)
    for name, gradient in first.items():
        assert bool(gradient.any()) == name.endswith("lambda_b"), name
    stir(model, "fr")
    frozen = [b.clone() for b in part(model, "fr").adapter.shared.buffers()]
    check_gradients(model, "fr", batch)
    check_base_unmoved(model, batch)
    assert all(
        torch.equal(a, b) for a, b in zip(frozen, part(model, "fr").adapter.shared.buffers(), strict=True)
    )


@pytest.mark.parametrize("saved", [True, False])
def test_round_trip_with_and_without_the_projections(saved: bool, tmp_path: Path) -> None:
    """Saved once, or not at all and drawn again from the key; never once per site."""
    model = build("llama")
    inlay.attach(model, VeRA(rank=4, save_projection=saved, key=3), "fr", seed=0)
    stir(model, "fr")
    matrices = [k for k, t in part(model, "fr").adapter.tensors().items() if t.dim() == 2]
    assert matrices == (["shared.projections.A", "shared.projections.B"] if saved else [])
    check_round_trip(lambda: build("llama"), model, "fr", batch_for(model), tmp_path)


def test_the_key_and_nothing_else_makes_the_projections() -> None:
    one, two, other = build("llama"), build("gpt2"), build("llama")
    inlay.attach(one, VeRA(rank=4), seed=1)
    inlay.attach(two, VeRA(rank=4), seed=2)
    inlay.attach(other, VeRA(rank=4, key=1), seed=1)
    A, B, C = (part(m, "default").adapter.shared["projections"].A for m in (one, two, other))
    assert torch.equal(A, B)
    assert not torch.equal(A, C)


def test_merged_equals_applied_and_equals_a_low_rank_delta() -> None:
    model = build("llama")
    batch = batch_for(model)
    inlay.attach(model, METHOD, "fr", seed=0)
    stir(model, "fr")
    site, delta = part(model, "fr").adapter.placed[2]
    A, B = delta.matrices()
    x = torch.randn(5, site.in_features)
    low_rank = F.linear(F.linear(x, delta.lambda_d[:, None] * A), delta.lambda_b[:, None] * B)
    torch.testing.assert_close(delta(x, None, None), low_rank, rtol=1e-5, atol=1e-6)
    applied = logits(model, batch)
    inlay.merge(model)
    torch.testing.assert_close(logits(model, batch), applied, rtol=1e-5, atol=1e-5)


def test_routing_detach_and_copies() -> None:
    model = build("llama")
    batch = batch_for(model, rows=4)
    check_detach(model, lambda: inlay.attach(model, METHOD, "fr", seed=0), batch)
    inlay.attach(model, METHOD, "fr", seed=0)
    inlay.attach(model, VeRA(rank=3, key=9), "de", seed=1)
    stir(model, "fr")
    stir(model, "de", seed=2)
    check_routing(model, ["fr", None, "de", "fr"], batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), logits(model, batch))
    moved = twin.to(torch.bfloat16)
    assert part(moved, "fr").adapter.placed[0][1].shared.module.A.dtype == torch.bfloat16
    logits(moved, batch)
    assert part(model, "fr").adapter.placed[0][1].shared.module.A.dtype == torch.float32
