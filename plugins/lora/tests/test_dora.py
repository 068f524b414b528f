"""DoRA: equations and gradients against a plain reference, levels, folding, and that it learns."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.stack import need_state
from inlay.testing.layers import deltas_of, fit, settled, watch
from inlay.testing.models import FAMILIES, batch_for, build
from inlay.testing.tools import distance, shake
from inlay.weights import Level
from inlay_lora import DoRA, Gaussian, LoRA

QUERY = "bert.encoder.layer.0.attention.self.query"


def reference(weight: Tensor, delta: nn.Module, s: float, *, detach: bool = True) -> Tensor:
    """Return W' = m / ‖V‖ V by rows, the norm detached, as the paper writes it."""
    direction = weight + s * delta.up @ delta.down
    magnitude = weight.detach().norm(dim=1) + delta.magnitude
    norm = direction.norm(dim=1, keepdim=True)
    return magnitude[:, None] * direction / (norm.detach() if detach else norm)


def adapted(family: str, method: DoRA) -> nn.Module:
    """Return a tiny model with a DoRA whose every tensor is away from its start."""
    model = settled(family)
    inlay.attach(model, method, seed=0)
    shake(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_starts_at_the_base(family: str) -> None:
    model = settled(family)
    batch = batch_for(model)
    model(**batch)  # T5 notes a dtype at its first call
    before = model(**batch).logits
    inlay.attach(model, DoRA())
    assert distance(model(**batch).logits, before) < 1e-6


@pytest.mark.parametrize("method", [DoRA(rank=3, alpha=5), DoRA(rank=4, scaling="rsqrt", start=Gaussian())])
def test_output_is_that_of_the_published_weight(method: DoRA) -> None:
    model = adapted("bert", method)
    layer = model.get_submodule(QUERY)
    x, y = watch(model, QUERY, batch_for(model))
    expected = F.linear(x, reference(layer.weight, deltas_of(model)[QUERY], method.scale), layer.bias)
    assert distance(y, expected.detach()) < 1e-5
    assert distance(y, F.linear(x, layer.weight, layer.bias)) > 0.05


def test_output_and_norms_on_slices_stored_transposed() -> None:
    method = DoRA(rank=4, targets=["query"])
    model = adapted("gpt2", method)
    path = "transformer.h.0.attn.c_attn"
    layer = model.get_submodule(path)
    x, y = watch(model, path, batch_for(model))
    weight = reference(layer.weight.T[:32], deltas_of(model)[f"{path}[query]"], method.scale)
    assert distance(y[..., :32], F.linear(x, weight, layer.bias[:32]).detach()) < 1e-5
    with inlay.use(model):
        assert torch.equal(y[..., 32:], watch(model, path, batch_for(model))[1][..., 32:])


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_are_those_of_the_norm_detached_or_not(detach: bool) -> None:
    method = DoRA(rank=4, targets=["query"], layers=[0], detach_norm=detach)
    model = adapted("bert", method)
    layer, delta = model.get_submodule(QUERY), deltas_of(model)[QUERY]
    x, _ = watch(model, QUERY, batch_for(model))
    g = torch.randn(*x.shape)
    ours = torch.autograd.grad((layer(x) * g).sum(), [delta.down, delta.up, delta.magnitude])
    weight = reference(layer.weight, delta, method.scale, detach=detach)
    theirs = torch.autograd.grad(
        (F.linear(x, weight, layer.bias) * g).sum(), [delta.down, delta.up, delta.magnitude]
    )
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) < 1e-5


def test_cheap_norm_is_the_norm() -> None:
    model = adapted("llama", DoRA(targets=["up"]))
    path = "model.layers.1.mlp.up_proj"
    weight, delta = model.get_submodule(path).weight.detach(), deltas_of(model)[path]
    c = delta.factor(weight, weight.square().sum(1)).detach()
    magnitude = weight.norm(dim=1) + delta.magnitude.detach()
    dense = (weight + delta.scale * (delta.up @ delta.down).detach()).norm(dim=1)
    assert distance(magnitude / c, dense) < 1e-5
    assert distance(dense, weight.norm(dim=1)) > 0.01


def test_row_norms_of_the_merged_weight_are_the_magnitudes() -> None:
    model = adapted("bert", DoRA())
    layer, delta = model.get_submodule(QUERY), deltas_of(model)[QUERY]
    magnitude = layer.weight.norm(dim=1) + delta.magnitude
    bias = layer.bias.clone()
    batch = batch_for(model)
    before = model(**batch).logits.detach()
    assert inlay.merge(model).worst < 1e-5
    assert distance(layer.weight.norm(dim=1), magnitude) < 1e-5
    assert torch.equal(layer.bias, bias)
    assert distance(model(**batch).logits, before) < 1e-5


def test_a_change_along_the_weight_itself_changes_nothing() -> None:
    method = DoRA(rank=32, alpha=32, targets=["query"], layers=[0])
    model = settled("bert")
    inlay.attach(model, method, seed=0)
    layer, delta = model.get_submodule(QUERY), deltas_of(model)[QUERY]
    batch = batch_for(model)
    with inlay.use(model):
        before = model(**batch).logits
    with torch.no_grad():
        delta.down.copy_(torch.eye(32))
        delta.up.copy_(layer.weight)
    assert distance(model(**batch).logits, before) < 1e-5
    folded, _ = delta.fold(layer.weight.detach(), None)
    assert distance(folded, layer.weight) < 1e-6


def test_with_the_magnitude_of_its_direction_it_is_lora() -> None:
    method = DoRA(rank=4, targets=["query"], layers=[0])
    model = adapted("bert", method)
    layer, delta = model.get_submodule(QUERY), deltas_of(model)[QUERY]
    change = method.scale * (delta.up @ delta.down)
    with torch.no_grad():
        delta.magnitude.copy_((layer.weight + change).norm(dim=1) - layer.weight.norm(dim=1))
    x, y = watch(model, QUERY, batch_for(model))
    assert distance(y, F.linear(x, layer.weight + change, layer.bias)) < 1e-5


def test_count() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
    assert inlay.plan(model, DoRA(rank=16, targets=["query"])).parameters == 135_168
    assert (
        inlay.plan(model, DoRA(rank=16)).parameters == 3 * 135_168 + 2 * 16 * (4096 + 11_008) + 11_008 + 4096
    )


def test_two_stacked_act_one_after_the_other() -> None:
    first, second = DoRA(rank=4, targets=["query"]), DoRA(rank=2, targets=["query"])
    model = settled("bert")
    inlay.attach(model, first.named("a") + second.named("b"), "two", seed=0)
    shake(model)
    layer = model.get_submodule(QUERY)
    level = reference(layer.weight, deltas_of(model, "two/a")[QUERY], first.scale)
    weight = reference(level, deltas_of(model, "two/b")[QUERY], second.scale)
    batch = batch_for(model)
    x, y = watch(model, QUERY, batch)
    assert distance(y, F.linear(x, weight, layer.bias)) < 1e-5
    before = model(**batch).logits.detach()
    inlay.merge(model)
    assert distance(model(**batch).logits, before) < 1e-5


@torch.no_grad()
def test_on_top_of_a_trained_adapter_it_starts_where_that_left() -> None:
    model = settled("bert")
    inlay.attach(model, LoRA(targets=["query", "up"]), "lora", seed=0)
    shake(model)
    batch = batch_for(model)
    before = model(**batch).logits
    inlay.attach(model, DoRA(), "dora", seed=1)
    assert distance(model(**batch).logits, before) < 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_reach_a_lora_below_exactly(dropout: float) -> None:
    below, above = LoRA(rank=4, targets=["query"]), DoRA(rank=2, dropout=dropout, targets=["query"])
    model = settled("bert")
    inlay.attach(model, below + above, "s", seed=0)
    shake(model)
    layer = model.get_submodule(QUERY)
    lora, dora = deltas_of(model, "s/lora")[QUERY], deltas_of(model, "s/dora")[QUERY]
    x, _ = watch(model, QUERY, batch_for(model))
    g, ours = torch.randn(*x.shape), [lora.down, lora.up, dora.down, dora.up]
    dora.train()
    torch.manual_seed(3)
    got = torch.autograd.grad((layer(x) * g).sum(), ours)
    torch.manual_seed(3)
    kept = F.dropout(x, dropout) if dropout else x
    level = layer.weight + below.scale * lora.up @ lora.down
    direction = level.detach() + above.scale * (dora.up @ dora.down).detach()
    c = (level.detach().norm(dim=1) + dora.magnitude.detach()) / direction.norm(dim=1)
    y = F.linear(x, level, layer.bias) + (c - 1) * F.linear(kept, level)
    y = y + c * above.scale * F.linear(F.linear(kept, dora.down), dora.up)
    for a, b in zip(got, torch.autograd.grad((y * g).sum(), ours), strict=True):
        assert distance(a, b) < 1e-5


@pytest.mark.parametrize("way", ["weight in place", "weight replaced", "bias in place"])
def test_it_follows_a_base_that_changes(way: str) -> None:
    method = DoRA(rank=4, targets=["query"], layers=[0])
    model = adapted("bert", method)
    layer, delta = model.get_submodule(QUERY), deltas_of(model)[QUERY]
    batch = batch_for(model)
    model(**batch)
    with torch.no_grad():
        if way == "weight in place":
            layer.weight.mul_(1.5)
        elif way == "weight replaced":
            layer.weight.data = layer.weight.data + 0.1
        else:
            layer.bias.add_(0.5)
    x, y = watch(model, QUERY, batch)
    assert distance(y, F.linear(x, reference(layer.weight, delta, method.scale), layer.bias)) < 1e-5


def test_in_sixteen_bits_the_level_follows_the_bias_too() -> None:
    model = adapted("bert", DoRA(targets=["query"], layers=[0])).to(torch.bfloat16)
    layer = model.get_submodule(QUERY)
    level = Level(need_state(model).find("default")[0].adapter.sites[0], ())
    assert torch.equal(level.bias, layer.bias.float())
    with torch.no_grad():
        layer.bias.add_(0.5)
    assert torch.equal(level.bias, layer.bias.float())


def test_a_row_of_zeros_stays_finite() -> None:
    model = settled("bert")
    with torch.no_grad():
        model.get_submodule(QUERY).weight[3] = 0
    inlay.attach(model, DoRA(), seed=0)
    batch = batch_for(model, labels=True)
    with inlay.use(model):
        before = model(**batch).logits
    output = model(**batch)
    output.loss.backward()
    assert distance(output.logits, before) < 1e-6
    assert all(bool(p.grad.isfinite().all()) for d in deltas_of(model).values() for p in d.parameters())
    assert inlay.merge(model).worst < 1e-5


def test_magnitudes_are_exempt_from_weight_decay() -> None:
    model = build("bert")
    inlay.attach(model, DoRA(targets=["query"]))
    groups = inlay.parameter_groups(model, lr=1e-4)
    assert [[p.dim() for p in g["params"]] for g in groups] == [[2] * 4, [1] * 2]
    assert "weight_decay" not in groups[0]
    assert groups[1]["weight_decay"] == 0
    assert {g["lr"] for g in groups} == {1e-4}


def test_in_bfloat16_small_steps_of_the_magnitude_are_kept() -> None:
    model = settled("bert").to(torch.bfloat16)
    batch = batch_for(model, labels=True)
    before = model(**batch).logits.detach()
    inlay.attach(model, DoRA(targets=["query"]), seed=0)
    assert torch.equal(model(**batch).logits, before)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-4))
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    moved = deltas_of(model)[QUERY].magnitude.detach().abs()
    assert 1e-4 < float(moved.max()) < 1e-3


def test_it_survives_a_copy_between_calls() -> None:
    model = adapted("bert", DoRA())
    batch = batch_for(model)
    before = model(**batch).logits
    assert torch.equal(copy.deepcopy(model)(**batch).logits, before)


def test_it_compiles_as_one_graph() -> None:
    layer, x = adapted("bert", DoRA()).get_submodule(QUERY), torch.randn(3, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert distance(compiled(x), layer(x)) < 1e-6


@pytest.mark.parametrize(("family", "fraction"), [("llama", 0.6), ("gpt2", 0.6), ("bert", 0.2)])
def test_it_learns(family: str, fraction: float) -> None:
    model = settled(family)
    inlay.attach(model, DoRA(), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert before > 0.5
    assert after < fraction * before
    inlay.check_training(model)
