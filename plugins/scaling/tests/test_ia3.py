"""(IA)^3: equations, counts of the published models, folding, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import inlay
from inlay.testing.layers import deltas_of, fit, settled, watch
from inlay.testing.models import FAMILIES, batch_for, build
from inlay.testing.tools import distance, shake
from inlay_scaling import IA3


def adapted(family: str, **settings: Any) -> nn.Module:
    """Return a tiny model with an (IA)^3 whose vectors are away from 1."""
    model = settled(family)
    inlay.attach(model, IA3(**settings), seed=0)
    shake(model)
    return model


def vector(model: nn.Module, site: str, name: str = "default") -> torch.Tensor:
    """Return l of a site."""
    return 1 + deltas_of(model, name)[site].scale.detach()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_starts_exactly_at_the_base(family: str) -> None:
    model = build(family)
    batch = batch_for(model)
    model(**batch)  # T5 notes a dtype at its first call
    before = model(**batch).logits
    inlay.attach(model, IA3())
    assert all(bool((vector(model, site) == 1).all()) for site in deltas_of(model))
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize(
    ("family", "site"),
    [("llama", "model.layers.1.self_attn.k_proj"), ("bert", "bert.encoder.layer.0.attention.self.value")],
)
def test_keys_and_values_are_scaled_at_the_output(family: str, site: str) -> None:
    model = adapted(family)
    x, y = watch(model, site, batch_for(model))
    layer = model.get_submodule(site)
    assert distance(y, vector(model, site) * F.linear(x, layer.weight, layer.bias)) < 1e-6


@pytest.mark.parametrize("path", ["model.layers.0.mlp.down_proj", "bert.encoder.layer.1.output.dense"])
def test_the_down_projection_is_scaled_at_its_input(path: str) -> None:
    model = adapted("llama" if path.startswith("model") else "bert")
    x, y = watch(model, path, batch_for(model))
    layer = model.get_submodule(path)
    assert vector(model, path).shape == (48,)
    assert distance(y, F.linear(vector(model, path) * x, layer.weight, layer.bias)) < 1e-6


def test_only_key_and_value_slices_of_a_fused_projection() -> None:
    model = adapted("gpt2")
    path = "transformer.h.0.attn.c_attn"
    x, y = watch(model, path, batch_for(model))
    layer = model.get_submodule(path)
    query, key, value = (x @ layer.weight + layer.bias).split(32, dim=-1)
    expected = (query, vector(model, f"{path}[key]") * key, vector(model, f"{path}[value]") * value)
    assert distance(y, torch.cat(expected, -1)) < 1e-6
    with inlay.use(model):
        assert torch.equal(y[..., :32], watch(model, path, batch_for(model))[1][..., :32])


def test_targets_by_name_know_which_side_to_scale() -> None:
    model = adapted("llama", targets=["v_proj", "down_proj"])
    faces = {site.split(".")[-1]: delta.face for site, delta in deltas_of(model).items()}
    assert faces == {"v_proj": "output", "down_proj": "input"}


def test_widths_under_grouped_query_attention() -> None:
    model = build("llama")
    inlay.attach(model, IA3())
    assert vector(model, "model.layers.0.self_attn.k_proj").shape == (16,)
    assert sum(p.numel() for d in deltas_of(model).values() for p in d.parameters()) == 2 * (16 + 16 + 48)


@pytest.mark.parametrize(
    ("width", "inner", "heads", "count"), [(2048, 5120, 32, 540_672), (4096, 10_240, 64, 1_081_344)]
)
def test_counts_of_t0(width: int, inner: int, heads: int, count: int) -> None:
    config = T5Config(
        d_model=width, d_ff=inner, num_layers=24, num_heads=heads, d_kv=64, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    assert inlay.plan(model, IA3()).parameters == count


def test_count_of_llama_7b() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    assert inlay.plan(model, IA3()).parameters == 614_400


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_merged_equals_adapted(family: str) -> None:
    model = adapted(family)
    batch = batch_for(model)
    before = model(**batch).logits.detach()
    assert inlay.merge(model).worst < 1e-5
    assert distance(model(**batch).logits, before) < 1e-5
    inlay.unmerge(model)
    assert distance(model(**batch).logits, before) < 1e-7


def test_folded_weights() -> None:
    model = adapted("bert")
    key, down = (
        model.get_submodule(f"bert.encoder.layer.0.{n}") for n in ("attention.self.key", "output.dense")
    )
    l, m = (vector(model, f"bert.encoder.layer.0.{n}") for n in ("attention.self.key", "output.dense"))
    expected = [torch.diag(l) @ key.weight, l * key.bias, down.weight @ torch.diag(m), down.bias.clone()]
    inlay.merge(model)
    for got, wanted in zip([key.weight, key.bias, down.weight, down.bias], expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-7)


def test_scaling_the_linear_half_of_a_gated_unit_is_scaling_the_down_projections_input() -> None:
    outside, inside = adapted("t5", targets=["both.up"]), settled("t5")
    inlay.attach(inside, IA3(targets=["both.down"]), seed=0)
    ours = {site.rpartition(".")[0]: delta for site, delta in deltas_of(outside).items()}
    assert len(ours) == 4
    with torch.no_grad():
        for site, delta in deltas_of(inside).items():
            delta.scale.copy_(ours[site.rpartition(".")[0]].scale)
    batch = batch_for(inside)
    assert distance(outside(**batch).logits, inside(**batch).logits) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_constant_on_keys_multiplies_the_attention_logits(family: str) -> None:
    model, base = settled(family), settled(family)
    batch = batch_for(model)
    inlay.attach(model, IA3(targets=["key"]), seed=0)
    with torch.no_grad():
        for delta in deltas_of(model).values():
            delta.scale.fill_(0.7)
    plain = base(**batch).logits
    for module in base.modules():
        if hasattr(module, "scaling"):
            module.scaling *= 1.7
    assert distance(model(**batch).logits, base(**batch).logits) < 1e-5
    assert distance(model(**batch).logits, plain) > 0.01


def test_two_adapters_multiply() -> None:
    model = settled("bert")
    inlay.attach(model, IA3(), "a", seed=0)
    inlay.attach(model, IA3(), "b", seed=1)
    shake(model)
    site = "bert.encoder.layer.1.attention.self.key"
    x, y = watch(model, site, batch_for(model))
    layer = model.get_submodule(site)
    product = vector(model, site, "a") * vector(model, site, "b")
    assert distance(y, product * F.linear(x, layer.weight, layer.bias)) < 1e-6


def test_no_weight_decay() -> None:
    model = build("bert")
    inlay.attach(model, IA3())
    assert [g["weight_decay"] for g in inlay.parameter_groups(model)] == [0.0]


def test_in_bfloat16_small_steps_are_kept() -> None:
    model = settled("bert").to(torch.bfloat16)
    inlay.attach(model, IA3(), seed=0)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-4))
    model(**batch_for(model, labels=True)).loss.backward()
    optimizer.step()
    moved = deltas_of(model)["bert.encoder.layer.0.attention.self.value"].scale.detach().abs()
    assert 5e-5 < float(moved.max()) < 2e-4


@pytest.mark.parametrize(("family", "fraction"), [("llama", 0.8), ("gpt2", 0.7), ("bert", 0.3)])
def test_it_learns(family: str, fraction: float) -> None:
    model = settled(family)
    inlay.attach(model, IA3(), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert before > 0.5
    assert after < fraction * before
    inlay.check_training(model)
