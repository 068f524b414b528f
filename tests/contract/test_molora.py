"""MoLORA on the contract: a composite of E children of one kind, mixed per token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from contract_checks import (
    GREEDY,
    batch_for,
    build,
    check_base_unmoved,
    check_checkpointing,
    check_detach,
    check_gradients,
    check_round_trip,
    check_routing,
    logits,
    offered,
    padded,
    part,
    stir,
    uncached,
)
from rehearsal.molora import MoLORA
from torch import nn

import inlay
from inlay.authoring import Adapter, hookimpl
from inlay_adapter import SerialAdapter
from inlay_lora import LoRA
from inlay_scaling import IA3

EXPERT = LoRA(rank=2, alpha=16, targets=("query", "value", "down"))
METHOD = MoLORA(expert=EXPERT, experts=3)


@dataclass(frozen=True)
class FrozenA(LoRA):
    """LoRA whose A never learns (LoRA-FA's rule), to see a part's own mask inside a composite."""

    id: ClassVar[str] = "contract_frozen_a"

    @staticmethod
    @hookimpl
    def trainable_mask(method: FrozenA, adapter: Adapter) -> dict[str, bool]:  # type: ignore[override]
        return {name: not name.endswith("down") for name, _ in adapter.named_parameters()}


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    with offered(MoLORA, FrozenA):
        yield


def attached(method: MoLORA = METHOD, family: str = "llama") -> nn.Module:
    model = build(family)
    inlay.attach(model, method, "fr", seed=0)
    stir(model, "fr", std=1.0)
    return model


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_starts_as_the_base_and_matches_plain_hooks(family: str, top_k: int | None) -> None:
    model, reference = build(family), build(family)
    batch = batch_for(model)
    plain = logits(model, batch)
    inlay.attach(model, MoLORA(expert=EXPERT, experts=3, top_k=top_k), "fr", seed=0)
    assert torch.equal(logits(model, batch), plain)
    stir(model, "fr", std=1.0)
    for site, mixture in part(model, "fr").adapter.placed:

        def mix(m: nn.Module, args: object, y: torch.Tensor, mixture: object = mixture) -> torch.Tensor:
            (x,) = args
            weights = (x @ mixture.router.T).exp()
            weights = weights / weights.sum(-1, keepdim=True)
            if top_k is not None:
                weights = weights * (weights >= weights.sort(descending=True).values[..., 1:2])
            changes = [(x @ e.down.T) @ e.up.T * 16 / 2 for e in mixture.experts]
            return y + sum(w[..., None] * c for w, c in zip(weights.unbind(-1), changes, strict=True))

        reference.get_submodule(site.name).register_forward_hook(mix)
    wanted = logits(reference, batch)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain).abs().max() > 1e-3


def test_count_and_experts_start_apart() -> None:
    model = build("llama")
    plan = inlay.attach(model, METHOD, "fr", seed=0)
    sites = plan.parts[0].sites
    assert plan.parameters == sum(3 * 2 * (s.in_features + s.out_features) + 3 * s.in_features for s in sites)
    for _, mixture in part(model, "fr").adapter.placed:
        first, second, _ = mixture.experts
        assert not torch.equal(first.down, second.down)


def test_one_expert_or_equal_experts_are_a_plain_lora() -> None:
    batch = batch_for(build("llama"))
    for count in (1, 3):
        model, reference = attached(MoLORA(expert=EXPERT, experts=count)), build("llama")
        inlay.attach(reference, EXPERT, "fr")
        twin = part(reference, "fr").adapter
        for (_, mixture), (_, plain) in zip(part(model, "fr").adapter.placed, twin.placed, strict=True):
            plain.load_state_dict(mixture.experts[0].state_dict())
            for expert in mixture.experts:
                expert.load_state_dict(plain.state_dict())
        torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-5, atol=1e-5)


def test_a_dead_router_averages_and_order_does_not_matter() -> None:
    model, other = attached(), attached()
    batch = batch_for(model)
    for _, mixture in part(other, "fr").adapter.placed:
        order = [2, 0, 1]
        values = [e.state_dict() for e in (mixture.experts[i] for i in order)]
        values = [{k: t.clone() for k, t in v.items()} for v in values]
        with torch.no_grad():
            mixture.router.copy_(mixture.router[order].clone())
        for expert, value in zip(mixture.experts, values, strict=True):
            expert.load_state_dict(value)
    torch.testing.assert_close(logits(other, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
    mean = build("llama")
    inlay.attach(mean, LoRA(rank=6, alpha=16, targets=EXPERT.targets), "fr")
    for (_, mixture), (_, plain) in zip(
        part(model, "fr").adapter.placed, part(mean, "fr").adapter.placed, strict=True
    ):
        with torch.no_grad():
            mixture.router.zero_()
            plain.down.copy_(torch.cat([e.down for e in mixture.experts]))
            plain.up.copy_(torch.cat([e.up for e in mixture.experts], dim=1))
    torch.testing.assert_close(logits(model, batch), logits(mean, batch), rtol=1e-5, atol=1e-5)


def test_router_is_float32_in_a_half_precision_model_and_under_autocast() -> None:
    model = build("llama", dtype=torch.bfloat16)
    inlay.attach(model, METHOD, "fr", seed=0)
    (_, mixture), *_ = part(model, "fr").adapter.placed
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    wanted = (x.float() @ mixture.router.float().T).softmax(-1)
    assert torch.equal(mixture.weights(x), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixture.weights(x), wanted)
    assert logits(model, batch_for(model)).dtype == torch.bfloat16


def test_any_family_of_experts() -> None:
    """MoV is IA3 in the expert's place; serial adapters at sublayers mix as well."""
    for expert in (IA3(targets=("key", "value")), SerialAdapter(placement="pfeiffer", rank=2)):
        model = build("bert")
        batch = batch_for(model)
        inlay.attach(model, MoLORA(expert=expert, experts=2), "fr", seed=0)
        stir(model, "fr", std=0.5)
        check_gradients(model, "fr", batch_for(model, labels=True))
        check_routing(model, ["fr", None], batch_for(model, rows=2))
        for _, mixture in part(model, "fr").adapter.placed:
            mixture.experts[1].load_state_dict(mixture.experts[0].state_dict())
        single = build("bert")
        inlay.attach(single, expert, "fr", seed=0)
        for (_, mixture), (_, plain) in zip(
            part(model, "fr").adapter.placed, part(single, "fr").adapter.placed, strict=True
        ):
            plain.load_state_dict(mixture.experts[0].state_dict())
        torch.testing.assert_close(logits(model, batch), logits(single, batch), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits(single, batch), logits(build("bert"), batch), atol=1e-5)


def test_gradients_routing_detach_and_round_trip(tmp_path: Path) -> None:
    model = build("llama")
    batch, labelled = batch_for(model, rows=4), batch_for(model, labels=True)
    check_detach(model, lambda: inlay.attach(model, METHOD, "fr", seed=0), batch)
    inlay.attach(model, METHOD, "fr", seed=0)
    stir(model, "fr")
    check_gradients(model, "fr", labelled)
    check_base_unmoved(model, labelled)
    check_round_trip(lambda: build("llama"), model, "fr", batch, tmp_path)
    inlay.attach(model, MoLORA(expert=LoRA(rank=1), experts=2), "de", seed=1, activate=False)
    stir(model, "de", seed=2)
    check_routing(model, ["fr", None, "de", "fr"], batch)


def test_cached_generation_equals_uncached() -> None:
    model = attached()
    batch = padded(model, [6, 2, 5])
    got = model.generate(**batch, max_new_tokens=6, **GREEDY)[:, 6:]
    assert torch.equal(got, uncached(model, batch, 6))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model = attached()
    check_checkpointing(model, batch_for(model, labels=True), reentrant=reentrant)


def test_an_experts_own_mask_and_groups_hold_inside() -> None:
    model = build("llama")
    inlay.attach(model, MoLORA(expert=FrozenA(rank=2), experts=2), "fr", seed=0)
    stir(model, "fr")
    names = set(part(model, "fr").adapter.trainable_names())
    assert {n.rsplit(".", 1)[-1] for n in names} == {"up", "router"}
    check_gradients(model, "fr", batch_for(model, labels=True))
    rates = {g["lr"] for g in inlay.parameter_groups(model)}
    assert rates == {LoRA.lr, MoLORA.lr}


def test_targets_of_the_mixture_hold_for_experts_that_name_none() -> None:
    model = build("llama")
    inlay.attach(model, MoLORA(expert=LoRA(rank=1), experts=2, targets=["up"], layers=[0]), "fr")
    assert [s.name for s in part(model, "fr").adapter.sites] == ["model.layers.0.mlp.up_proj"]
    named = inlay.plan(model, MoLORA(expert=EXPERT, experts=2, targets=["up"])).parts[0]
    assert {s.role for s in named.sites} == {"query", "value", "down"}


def test_merging_is_refused_with_the_reason() -> None:
    with pytest.raises(inlay.CannotMerge, match="its router weighs the experts by the token"):
        inlay.merge(attached())
