"""SSF: equations at every kind of site, counts, where it folds and where not, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import inlay
from inlay.errors import ConfigError, MergedError
from inlay.testing.layers import deltas_of, fit, settled, watch
from inlay.testing.models import FAMILIES, batch_for, build
from inlay.testing.tools import distance, shake
from inlay_scaling import SSF


def adapted(family: str, **settings: Any) -> nn.Module:
    """Return a tiny model with an SSF well away from its start."""
    model = settled(family)
    inlay.attach(model, SSF(**settings), seed=0)
    shake(model)
    return model


def pair(model: nn.Module, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (γ, β) of a site."""
    delta = deltas_of(model)[site]
    return 1 + delta.scale.detach(), delta.shift.detach()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_start(family: str) -> None:
    model = settled(family)
    batch = batch_for(model)
    model(**batch)  # T5 notes a dtype at its first call
    before = model(**batch).logits
    inlay.attach(model, SSF(init_std=0), "exact")
    assert torch.equal(model(**batch).logits, before)
    inlay.attach(model, SSF(), "near", seed=0)
    assert 1e-4 < distance(model(**batch).logits, before) < 0.5
    assert SSF(init_std=0).starts_as_identity
    assert not SSF().starts_as_identity


def test_starting_values() -> None:
    model = build("bert", hidden_size=768, num_hidden_layers=1, intermediate_size=3072)
    inlay.attach(model, SSF(), seed=0)
    gamma, beta = pair(model, "bert.encoder.layer.0.intermediate.dense")
    assert float(gamma.mean()) == pytest.approx(1, abs=2e-3)
    assert float(gamma.std()) == pytest.approx(0.02, rel=0.1)
    assert float(beta.mean()) == pytest.approx(0, abs=2e-3)
    assert float(beta.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("bert", "bert.encoder.layer.0.intermediate.dense"),
        ("bert", "bert.embeddings.LayerNorm"),
        ("bert", "bert.pooler.dense"),
        ("llama", "model.layers.1.self_attn.k_proj"),
        ("llama", "model.norm"),
        ("gpt2", "transformer.h.0.mlp.c_proj"),
        ("vit", "vit.embeddings.patch_embeddings.projection"),
    ],
)
def test_output_is_scaled_and_shifted_by_channel(family: str, site: str) -> None:
    model = adapted(family)
    x, y = watch(model, site, batch_for(model))
    gamma, beta = pair(model, site)
    with torch.no_grad(), inlay.use(model):
        plain = model.get_submodule(site)(x)
    channels = (1, -1, 1, 1) if y.dim() == 4 else (-1,)
    assert distance(y, gamma.view(channels) * plain + beta.view(channels)) < 1e-6
    assert distance(y, plain) > 0.05


def test_a_fused_projection_has_a_pair_for_each_of_its_outputs() -> None:
    model = adapted("gpt2")
    path = "transformer.h.0.attn.c_attn"
    x, y = watch(model, path, batch_for(model))
    pairs = [pair(model, f"{path}[{role}]") for role in ("query", "key", "value")]
    gamma, beta = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    layer = model.get_submodule(path)
    assert gamma.shape == beta.shape == (96,)
    assert distance(y, gamma * (x @ layer.weight + layer.bias) + beta) < 1e-6


def test_count_of_vit_b16() -> None:
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=100))
    assert inlay.plan(model, SSF()).parameters == 205_824
    assert inlay.plan(model, SSF(), train=("head",)).parameters == 282_724


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_merged_equals_adapted(family: str) -> None:
    model = adapted(family)
    shapes = {k: v.shape for k, v in settled(family).state_dict().items()}
    batch = batch_for(model)
    before = model(**batch).logits.detach()
    assert inlay.merge(model, undo=False).worst < 1e-5
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert distance(model(**batch).logits, before) < 1e-5


def test_layers_without_a_bias_get_one() -> None:
    model = adapted("llama", targets=["linear"])
    batch = batch_for(model)
    before = model(**batch).logits.detach()
    gamma, beta = pair(model, "model.layers.0.mlp.up_proj")
    expected = gamma[:, None] * model.model.layers[0].mlp.up_proj.weight
    inlay.merge(model, undo=False)
    assert torch.equal(model.model.layers[0].mlp.up_proj.bias, beta)
    assert distance(model.model.layers[0].mlp.up_proj.weight, expected) < 1e-7
    assert distance(model(**batch).logits, before) < 1e-5
    new = model.state_dict().keys() - settled("llama").state_dict().keys()
    assert len(new) == 14
    assert all(key.endswith("_proj.bias") for key in new)


def test_a_patch_embedding_without_a_bias_gets_one() -> None:
    model = settled("vit")
    patches = model.get_submodule("vit.embeddings.patch_embeddings.projection")
    patches.bias = None
    inlay.attach(model, SSF(), seed=0)
    shake(model)
    batch = batch_for(model)
    before = model(**batch).logits.detach()
    inlay.merge(model)
    assert patches.bias.shape == (32,)
    assert distance(model(**batch).logits, before) < 1e-5
    inlay.unmerge(model)
    assert patches.bias is None


def test_a_shift_behind_a_norm_without_a_bias_cannot_merge() -> None:
    model = adapted("llama")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(inlay.CannotMerge, match=r"input_layernorm is a LlamaRMSNorm without a bias"):
        inlay.merge(model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_a_scale_alone_behind_such_a_norm_merges() -> None:
    model = adapted("llama", targets=["norm"])
    with torch.no_grad():
        for delta in deltas_of(model).values():
            delta.shift.zero_()
    batch = batch_for(model)
    before = model(**batch).logits.detach()
    inlay.merge(model, undo=False)
    assert distance(model(**batch).logits, before) < 1e-5
    assert model.state_dict().keys() == settled("llama").state_dict().keys()


def test_merging_twice_is_an_error() -> None:
    model = adapted("bert")
    inlay.merge(model)
    with pytest.raises(MergedError, match="default/ssf"):
        inlay.merge(model)


def test_no_weight_decay() -> None:
    model = build("bert")
    inlay.attach(model, SSF())
    assert [g["weight_decay"] for g in inlay.parameter_groups(model)] == [0.0]


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="init_std=-1"):
        SSF(init_std=-1)


@pytest.mark.parametrize(("family", "fraction"), [("llama", 0.6), ("gpt2", 0.6), ("bert", 0.3), ("vit", 0.2)])
def test_it_learns(family: str, fraction: float) -> None:
    model = settled(family)
    inlay.attach(model, SSF(), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert before > 0.5
    assert after < fraction * before
    inlay.check_training(model)
