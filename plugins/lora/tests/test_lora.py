"""LoRA: equations, starting values, counts, folding, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import deltas_of, fit, settled, watch
from inlay.testing.models import FAMILIES, batch_for, build
from inlay.testing.tools import distance, shake
from inlay_lora import Gaussian, LoRA


def adapted(family: str, method: LoRA, **changes: object) -> nn.Module:
    """Return a tiny model with a LoRA whose every tensor is away from its start."""
    model = settled(family, **changes)
    inlay.attach(model, method, seed=0)
    shake(model)
    return model


def change(model: nn.Module, site: str, method: LoRA) -> torch.Tensor:
    """Return s B A (out, in) from the published formula and the adapter's stored factors."""
    delta = deltas_of(model)[site]
    r = method.rank
    s = method.alpha / r if method.scaling == "standard" else method.alpha / math.sqrt(r)
    return s * (delta.up.detach() @ delta.down.detach())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()  # with gradients torch chooses another kernel where a weight does not require one
def test_starts_exactly_at_the_base(family: str) -> None:
    model = build(family)
    batch = batch_for(model)
    model(**batch)  # T5 notes a dtype at its first call
    before = model(**batch).logits
    inlay.attach(model, LoRA())
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize(
    "method", [LoRA(rank=3, alpha=5), LoRA(rank=4, alpha=8, scaling="rsqrt", start=Gaussian())]
)
@pytest.mark.parametrize(
    ("family", "site"),
    [("llama", "model.layers.1.self_attn.v_proj"), ("bert", "bert.encoder.layer.0.attention.self.query")],
)
def test_linear_is_the_formula(family: str, site: str, method: LoRA) -> None:
    model = adapted(family, method)
    x, y = watch(model, site, batch_for(model))
    layer = model.get_submodule(site)
    expected = F.linear(x, layer.weight, layer.bias) + F.linear(x, change(model, site, method))
    assert distance(y, expected) < 1e-6
    assert distance(y, F.linear(x, layer.weight, layer.bias)) > 0.05


def test_slices_of_a_fused_projection_have_factors_of_their_own() -> None:
    method = LoRA(rank=4)
    model = adapted("gpt2", method)
    path = "transformer.h.0.attn.c_attn"
    x, y = watch(model, path, batch_for(model))
    layer = model.get_submodule(path)
    query, key, value = (x @ layer.weight + layer.bias).split(32, dim=-1)
    query = query + F.linear(x, change(model, f"{path}[query]", method))
    value = value + F.linear(x, change(model, f"{path}[value]", method))
    assert distance(y, torch.cat((query, key, value), -1)) < 1e-6
    with inlay.use(model):
        assert torch.equal(y[..., 32:64], watch(model, path, batch_for(model))[1][..., 32:64])


def test_a_fused_projection_by_name_has_one_pair_of_factors() -> None:
    method = LoRA(rank=4, targets=["c_attn"])
    model = adapted("gpt2", method)
    path = "transformer.h.1.attn.c_attn"
    x, y = watch(model, path, batch_for(model))
    layer = model.get_submodule(path)
    assert change(model, path, method).shape == (96, 32)
    assert distance(y, x @ layer.weight + layer.bias + F.linear(x, change(model, path, method))) < 1e-6


def bart() -> nn.Module:
    sizes = {
        "d_model": 32,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_layers": 1,
        "decoder_layers": 1,
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=64, scale_embedding=True, **sizes, **heads)
    ).eval()


def gemma() -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "max_position_embeddings": 32,
    }
    heads = {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=64, **sizes, **heads)).eval()


@pytest.mark.parametrize(
    ("make", "path", "factor"),
    [
        (lambda: settled("bert"), "bert.embeddings.word_embeddings", 1.0),
        (bart, "model.encoder.embed_tokens", math.sqrt(32)),
        (gemma, "model.embed_tokens", math.sqrt(32)),
    ],
)
def test_embedding_is_the_formula_times_the_models_own_scale(make: object, path: str, factor: float) -> None:
    model: nn.Module = make()  # type: ignore[operator]
    method = LoRA(rank=3, alpha=6, targets=["embedding"])
    inlay.attach(model, method, seed=0)
    delta = deltas_of(model)[path]
    assert not delta.down.any()
    assert abs(float(delta.up.detach().std()) - 1) < 0.3
    shake(model)
    ids = torch.randint(3, 60, (2, 5))
    _, y = watch(model, path, {"input_ids": ids})
    table = model.get_submodule(path).weight
    expected = factor * (table[ids] + change(model, path, method).T[ids])
    assert distance(y, expected) < 1e-6
    assert distance(y, factor * table[ids]) > 0.05


def test_the_padding_row_never_learns() -> None:
    model = settled("bert")
    inlay.attach(model, LoRA(targets=["embedding"]), seed=0)
    delta = deltas_of(model)["bert.embeddings.word_embeddings"]
    ids = torch.tensor([[5, 9, 0, 0], [7, 0, 0, 0]])
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert not delta.down.grad[:, 0].any()
    assert delta.down.grad[:, 5].any()


def test_only_the_factor_beside_the_zero_one_learns_at_first() -> None:
    model = settled("bert")
    inlay.attach(model, LoRA(targets=["query", "embedding"]), seed=0)
    model(**batch_for(model, labels=True)).loss.backward()
    for name, delta in deltas_of(model).items():
        still, moving = (delta.up, delta.down) if "embeddings" in name else (delta.down, delta.up)
        assert not still.grad.any()
        assert moving.grad.any()


def test_counts() -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    assert inlay.plan(model, LoRA(targets=["up"], layers=[0])).parameters == 8 * (768 + 3072) == 30_720
    assert inlay.plan(model, LoRA()).parameters == 24 * 8 * 2 * 768
    assert inlay.plan(model, LoRA(targets=["embedding"])).parameters == 8 * (30_522 + 768)


@pytest.mark.parametrize(
    ("method", "bound"), [(LoRA(rank=16), 1 / math.sqrt(768)), (LoRA(rank=16, start=Gaussian()), None)]
)
def test_starting_values(method: LoRA, bound: float | None) -> None:
    model = build("bert", hidden_size=768, num_hidden_layers=1)
    inlay.attach(model, method, seed=0)
    down = deltas_of(model)["bert.encoder.layer.0.attention.self.query"].down.detach()
    if bound is None:
        assert float(down.std()) == pytest.approx(1 / 16, rel=0.05)
    else:
        assert 0.99 * bound < float(down.abs().max()) <= bound
        assert float(down.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_scalings() -> None:
    assert LoRA(rank=16, alpha=16).scale == 1
    assert LoRA(rank=16, alpha=16, scaling="rsqrt").scale == 4
    assert LoRA(rank=1, alpha=3).scale == LoRA(rank=1, alpha=3, scaling="rsqrt").scale == 3


@pytest.mark.parametrize("scaling", ["standard", "rsqrt"])
def test_merged_weights_in_stored_orientation(scaling: str) -> None:
    method = LoRA(rank=4, alpha=6, scaling=scaling, targets=["up", "query"])
    model = adapted("gpt2", method)
    up, attn = "transformer.h.0.mlp.c_fc", "transformer.h.0.attn.c_attn"
    expected = model.get_submodule(up).weight + change(model, up, method).T
    fused = model.get_submodule(attn).weight.clone()
    fused[:, :32] += change(model, f"{attn}[query]", method).T
    batch = batch_for(model)
    before = model(**batch).logits.detach()
    assert inlay.merge(model).worst < 1e-5
    assert distance(model.get_submodule(up).weight, expected) < 1e-7
    assert distance(model.get_submodule(attn).weight, fused) < 1e-7
    assert distance(model(**batch).logits, before) < 1e-6


def test_an_untied_embedding_merges() -> None:
    method = LoRA(rank=4, targets=["embedding"])
    model = adapted("llama", method, pad_token_id=None)
    batch = batch_for(model)
    before = model(**batch).logits.detach()
    inlay.merge(model, undo=False)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert "inlay" not in dict(model.model.embed_tokens.named_children())
    assert distance(model(**batch).logits, before) < 1e-6


def test_a_tied_embedding_does_not_merge() -> None:
    model = settled("qwen")
    inlay.attach(model, LoRA(targets=["embedding"]), seed=0)
    shake(model)
    with pytest.raises(inlay.CannotMerge, match="tied to lm_head"):
        inlay.merge(model)


def test_doubling_b_doubles_the_change() -> None:
    model = adapted("llama", LoRA(targets=["down"], layers=[1]))
    site = "model.layers.1.mlp.down_proj"
    batch = batch_for(model)
    with inlay.use(model):
        _, base = watch(model, site, batch)
    once = watch(model, site, batch)[1] - base
    with torch.no_grad():
        deltas_of(model)[site].up.mul_(2)
    assert distance(watch(model, site, batch)[1] - base, 2 * once) < 1e-6


def test_dropout_acts_on_the_adapters_input_alone_and_only_in_training() -> None:
    method = LoRA(rank=4, dropout=0.5, targets=["down"], layers=[0])
    model = adapted("llama", method)
    site = "model.layers.0.mlp.down_proj"
    batch, layer = batch_for(model), model.get_submodule(site)
    x, y = watch(model, site, batch)
    assert distance(y, F.linear(x, layer.weight) + F.linear(x, change(model, site, method))) < 1e-6
    model.train()
    torch.manual_seed(1)
    x, y = watch(model, site, batch)
    torch.manual_seed(1)
    kept = F.dropout(x, 0.5)
    assert distance(y, F.linear(x, layer.weight) + F.linear(kept, change(model, site, method))) < 1e-6


def test_parameters_and_results_take_the_bases_dtype() -> None:
    model = build("llama", dtype=torch.bfloat16)
    inlay.attach(model, LoRA(), seed=0)
    shake(model)
    assert {p.dtype for d in deltas_of(model).values() for p in d.parameters()} == {torch.bfloat16}
    assert model(**batch_for(model)).logits.dtype == torch.bfloat16


def test_under_autocast() -> None:
    model = adapted("llama", LoRA(rank=4))
    batch = batch_for(model, labels=True)
    exact = model(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    assert distance(output.logits, exact) < 0.05
    assert all(p.grad is not None for d in deltas_of(model).values() for p in d.parameters())


def test_by_name_in_a_stack_as_text() -> None:
    model = build("llama")
    plan = inlay.attach(model, "lora(rank=2, alpha=4, targets=['o_proj'])")
    assert plan.parameters == 2 * 2 * (32 + 32)


@pytest.mark.parametrize(
    ("setting", "value"), [("rank", 0), ("alpha", 0), ("dropout", 1.0), ("scaling", "sqrt")]
)
def test_settings_are_checked(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{setting}={value!r}"):
        LoRA(**{setting: value})


@pytest.mark.parametrize(("family", "fraction"), [("llama", 0.7), ("gpt2", 0.7), ("bert", 0.3)])
def test_it_learns(family: str, fraction: float) -> None:
    model = settled(family)
    inlay.attach(model, LoRA(), seed=0)
    batch = batch_for(model, rows=6, labels=True)
    before, after = fit(model, batch)
    assert before > 0.5
    assert after < fraction * before
    inlay.check_training(model)
