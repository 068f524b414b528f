"""AdapterFusion on the contract: an adapter that computes with others, attached before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_checks import (
    batch_for,
    build,
    check_checkpointing,
    check_detach,
    check_gradients,
    check_round_trip,
    check_routing,
    logits,
    offered,
    part,
    stir,
)
from rehearsal.adapter_fusion import AdapterFusion
from torch import nn
from torch.nn import functional as F

import inlay
from inlay.errors import AttachError, ConfigError, StateError
from inlay.testing.snapshots import differences, snapshot
from inlay_adapter import SerialAdapter

NAMES = ("mnli", "qqp", "sst")


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    with offered(AdapterFusion):
        yield


def children(model: nn.Module, names: tuple[str, ...] = NAMES, **options: Any) -> None:
    """Attach Pfeiffer adapters that neither run nor learn, with values of their own."""
    for number, name in enumerate(names):
        what = SerialAdapter(placement="pfeiffer", rank=4, **options)
        inlay.attach(model, what, name, seed=number, activate=False, trainable=False)
        stir(model, name, seed=number)


def fused(family: str = "bert", names: tuple[str, ...] = NAMES, **options: Any) -> nn.Module:
    model = build(family)
    children(model, names)
    inlay.attach(model, AdapterFusion(adapters=names, **options), "fusion", seed=9)
    return model


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_matches_plain_hooks(family: str) -> None:
    """Post-norm: h = LN(f + a), out = LN(o + f + a). Pre-norm: h = f + a, out = o + f + a."""
    model, reference = fused(family), build(family)
    stir(model, "fusion")
    batch = batch_for(model)
    adapters = [part(model, name).adapter for name in NAMES]
    for number, (site, fusion) in enumerate(part(model, "fusion").adapter.placed):
        if family == "bert":
            block = reference.bert.encoder.layer[number]
            residual_at, y_at, norm = block.output, block.output.dropout, block.output.LayerNorm
        else:
            block = reference.model.layers[number]
            residual_at, y_at, norm = block.post_attention_layernorm, block.mlp, None
        kept: dict[str, Any] = {}

        def keep(module: nn.Module, args: Any, kept: Any = kept) -> None:
            kept["a"] = args[-1]

        def change(
            module: nn.Module, args: Any, f: Any, kept: Any = kept, norm: Any = norm, fusion: Any = fusion,
            site: Any = site,
        ) -> Any:  # fmt: skip
            h = f + kept["a"]
            h = h if norm is None else F.layer_norm(h, h.shape[-1:], norm.weight, norm.bias, norm.eps)
            q = h @ fusion.query.T + fusion.query_bias
            z = []
            for adapter in adapters:
                (delta,) = adapter.at(site)
                z.append(torch.relu(h @ delta.down.T + delta.down_bias) @ delta.up.T + delta.up_bias)
            scores = torch.stack([(q * (zn @ fusion.key.T + fusion.key_bias)).sum(-1) for zn in z])
            alpha = scores.exp() / scores.exp().sum(0)
            return f + sum(a[..., None] * (zn @ fusion.value.T) for a, zn in zip(alpha, z, strict=True))

        residual_at.register_forward_pre_hook(keep)
        y_at.register_forward_hook(change)
    wanted = logits(reference, batch)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits(build(family), batch)).abs().max() > 1e-3


def test_one_adapter_with_identity_values_is_that_adapter() -> None:
    model = fused(names=("mnli",))
    batch = batch_for(model)
    for _, fusion in part(model, "fusion").adapter.placed:
        torch.nn.init.eye_(fusion.value)
    got = logits(model, batch)
    with inlay.use(model, "mnli"):
        wanted = logits(model, batch)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    with inlay.use(model):
        assert not torch.allclose(got, logits(model, batch), atol=1e-4)


def test_dead_branches_are_the_base_and_equal_ones_make_the_attention_irrelevant() -> None:
    model = build("bert")
    batch = batch_for(model)
    plain = logits(model, batch)
    for name in NAMES:
        what = SerialAdapter(placement="pfeiffer", rank=4, init="lora")
        inlay.attach(model, what, name, seed=0, activate=False, trainable=False)
    inlay.attach(model, AdapterFusion(adapters=NAMES), "fusion", seed=9)
    assert torch.equal(logits(model, batch), plain)
    for name in NAMES:
        stir(model, name, seed=3)
    before = logits(model, batch)
    for _, fusion in part(model, "fusion").adapter.placed:
        torch.nn.init.normal_(fusion.query)
        torch.nn.init.normal_(fusion.key)
    assert not torch.allclose(before, plain, atol=1e-4)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-6)


def test_counts_and_regulariser() -> None:
    model = fused()
    adapter = part(model, "fusion").adapter
    assert sum(p.numel() for _, p in adapter.named_parameters()) == 2 * (3 * 32**2 + 2 * 32)
    start = 0.01 * 2 * 32 * 31 * 1e-12
    torch.testing.assert_close(inlay.auxiliary_loss(model), torch.tensor(start), rtol=1e-3, atol=0)
    for _, fusion in adapter.placed:
        torch.nn.init.eye_(fusion.value)
    assert inlay.auxiliary_loss(model) == 0
    adapter.placed[0][1].value.data[3, 4] = 2.0
    torch.testing.assert_close(inlay.auxiliary_loss(model), torch.tensor(0.04))
    with torch.device("meta"):
        base = build(
            "bert", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
        )
        inlay.attach(base, SerialAdapter(placement="pfeiffer"), "a", activate=False)
    assert inlay.plan(base, AdapterFusion(adapters=("a",))).parameters == 21_252_096


def test_fused_adapters_stay_their_own() -> None:
    """Referred to, not registered: no tensor is held, saved or trained twice."""
    model = fused()
    names = [n for n, _ in part(model, "fusion").adapter.named_parameters()]
    assert {n.rsplit(".", 1)[-1] for n in names} == {"query", "query_bias", "key", "key_bias", "value"}
    held = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    assert len(held) == len(set(held))
    twin = copy.deepcopy(model)
    batch = batch_for(model)
    before = logits(model, batch)
    stir(twin, "mnli", seed=11)
    assert torch.equal(logits(model, batch), before)
    assert not torch.allclose(logits(twin, batch), before, atol=1e-4)


def test_only_the_fusion_learns_and_values_do_not_decay() -> None:
    model = fused()
    batch = batch_for(model, labels=True)
    check_gradients(model, "fusion", batch)
    groups = inlay.parameter_groups(model)
    value_ids = {id(f.value) for _, f in part(model, "fusion").adapter.placed}
    assert {id(p) for p in groups[1]["params"]} == value_ids
    assert groups[1]["weight_decay"] == 0.0
    assert "weight_decay" not in groups[0]
    inlay.set_trainable(model, "mnli")
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for _, p in part(model, "mnli").adapter.named_parameters()}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_routing_between_the_fusion_and_its_parts(family: str) -> None:
    model = fused(family)
    stir(model, "fusion")
    check_routing(model, ["fusion", None, "qqp", "fusion"], batch_for(model, rows=4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model = fused()
    check_checkpointing(model, batch_for(model, labels=True), reentrant=reentrant)


def test_round_trip_after_its_parts(tmp_path: Path) -> None:
    model = fused()
    stir(model, "fusion")
    for name in NAMES:
        inlay.save(model, tmp_path / name, name)

    def parts_first(fresh: nn.Module) -> None:
        for name in NAMES:
            inlay.load(fresh, tmp_path / name, name, activate=False, trainable=False)

    fusion = tmp_path / "fusion"
    check_round_trip(lambda: build("bert"), model, "fusion", batch_for(model), fusion, parts_first)
    bare = build("bert")
    before = snapshot(bare)
    with pytest.raises((StateError, AttachError), match="'mnli'"):
        inlay.load(bare, fusion, "fusion")
    assert differences(before, bare) == []


def test_parts_are_kept_while_used_and_everything_comes_off() -> None:
    model = build("bert")
    batch = batch_for(model)

    def attach() -> None:
        children(model)
        inlay.attach(model, AdapterFusion(adapters=NAMES), "fusion", seed=9)

    check_detach(model, attach, batch)
    attach()
    before = logits(model, batch)
    with pytest.raises(AttachError, match=r"'fusion/adapter_fusion' computes with.*\n.*'qqp/serial_adapter'"):
        inlay.detach(model, "qqp")
    assert torch.equal(logits(model, batch), before)
    inlay.detach(model, "fusion")
    inlay.detach(model, "qqp")


def test_user_errors_leave_the_model_untouched() -> None:
    model = build("bert")
    children(model, ("mnli",), targets=("attention",))
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"layer.0.ffn has none of \['mnli'\]"):
        inlay.attach(model, AdapterFusion(adapters=("mnli",)), "fusion")
    with pytest.raises(StateError, match="no adapter is called 'nobody' here"):
        inlay.attach(model, AdapterFusion(adapters=("nobody",)), "fusion")
    with pytest.raises(ConfigError, match=r"adapters=\(\)"):
        inlay.attach(model, AdapterFusion(adapters=()), "fusion")
    assert differences(before, model) == []
