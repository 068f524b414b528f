"""Prefix tuning against the paper: counts, the softmax identity, caches, encoder-decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2Model

import inlay
from inlay.authoring import ConfigError, TargetError
from inlay.stack import need_state
from inlay.testing.effects import output
from inlay.testing.models import batch_for, build
from inlay.testing.tools import lively
from inlay_prefix import PrefixTuning, fold

DOUBLE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
FORMS = {"generator": PrefixTuning(hidden=16), "flat": PrefixTuning(reparam=False)}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def adapter(model: nn.Module) -> Any:
    return need_state(model).adapter_of("default")


def adapted(family: str, method: Any, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a float64 model with the method attached, and a batch."""
    model = build(family, dtype=torch.float64, **changes)
    inlay.attach(model, method, seed=3)
    return model, batch_for(model)


def padded(model: nn.Module, rows: int = 2) -> dict[str, Any]:
    """Return a batch whose first row is three tokens shorter, padded on the left."""
    batch = batch_for(model, rows=rows)
    batch.pop("labels", None)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :3] = 0
    batch["input_ids"][0, :3] = 0
    return batch


def values(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return each site's keys and values (H_kv, p, D) as the method's text defines them, in plain torch."""
    found = []
    for site, delta in adapter(model).placed:
        if delta.key is not None:
            found.append((delta.key, delta.value))
            continue
        group = f"{site.side}_" * bool(site.side) + ("cross" if site.cross else "self")
        g = adapter(model).shared[group]
        rows = torch.tanh(g.table @ g.down.T + g.down_bias) @ g.up.T + g.up_bias
        rows = rows.view(rows.shape[0], site.count, 2, site.kv_heads, site.head_dim)[:, site.index]
        found.append((rows[:, 0].transpose(0, 1), rows[:, 1].transpose(0, 1)))
    return [(k.detach(), v.detach()) for k, v in found]


# -- counts and starting values --------------------------------------------------------------------


def test_counts_of_the_paper_on_gpt2_medium() -> None:
    with torch.device("meta"):
        model = GPT2Model(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    assert inlay.plan(model, PrefixTuning()).parameters == 25_750_016
    inlay.attach(model, PrefixTuning())
    fold(model, "default")
    assert sum(p.numel() for _, p in adapter(model).named_parameters()) == 491_520
    assert inlay.plan(model, PrefixTuning(reparam=False), train=()).parameters == 491_520


def test_width_is_that_of_the_key_and_value_heads() -> None:
    """Grouped-query attention: Z has 2·L·H_kv·D columns, H_kv·D being half of d here."""
    model, _ = adapted("llama", PrefixTuning(hidden=16))
    generator = adapter(model).shared["self"]
    assert generator.table.shape == (10, 32)
    assert generator.up.shape == (2 * 2 * 2 * 8, 16)
    flat, _ = adapted("llama", PrefixTuning(length=3, reparam=False))
    assert {delta.key.shape for _, delta in adapter(flat).placed} == {(2, 3, 8)}


def test_starting_values() -> None:
    model = build("llama")
    inlay.attach(model, PrefixTuning(length=200))
    g = adapter(model).shared["self"].requires_grad_(False)
    assert float(g.table.std()) == pytest.approx(1, rel=0.05)
    assert g.down.abs().max() <= 32**-0.5
    assert float(g.down.std()) == pytest.approx((3 * 32) ** -0.5, rel=0.05)
    assert g.up.abs().max() <= 512**-0.5
    assert g.up_bias.abs().max() <= 512**-0.5
    assert g.up_bias.any()
    inlay.attach(model, PrefixTuning(length=200, reparam=False), name="flat")
    flat = need_state(model).adapter_of("flat").placed[0][1].requires_grad_(False)
    assert float(flat.key.std()) == pytest.approx(1, rel=0.05)
    assert not torch.equal(flat.key, flat.value)


# -- the equation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_a_gated_mean_of_the_base_and_the_prefix(form: str, implementation: str) -> None:
    """out = (1 − g)·Attn(q, K, V) + g·Attn(q, K_P, V_P), recomputed from the layer's own projections."""
    model, batch = adapted("bert", FORMS[form], attn_implementation=implementation)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 4:] = 0
    module = model.bert.encoder.layer[0].attention.self
    seen: list[Any] = []
    module.register_forward_hook(lambda m, args, out: seen.append((args[0], out[0])))
    output(model, batch)
    h, out = seen[0]
    split = lambda t: t.unflatten(-1, (4, 8)).transpose(1, 2)  # noqa: E731
    q, k, v = (split(linear(h)) for linear in (module.query, module.key, module.value))
    key, value = values(model)[0]
    hidden = batch["attention_mask"][:, None, None] == 0
    own = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(hidden, -torch.inf)
    extra = q @ key.transpose(1, 2) / 8**0.5
    masses = own.exp().sum(-1, keepdim=True), extra.exp().sum(-1, keepdim=True)
    gate = masses[1] / (masses[0] + masses[1])
    expected = (1 - gate) * (own.softmax(-1) @ v) + gate * (extra.softmax(-1) @ value)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), **DOUBLE)
    assert 0.1 < gate.mean() < 0.9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", ["none", "left"])
def test_equals_a_prefix_put_into_the_cache(form: str, implementation: str, mask: str) -> None:
    """The reference of peft and the authors' GPT-2 code: a cache of p tokens, positions from p on."""
    model, batch = adapted("llama", FORMS[form], attn_implementation=implementation)
    if mask == "left":
        batch = padded(model)
    rows, length = batch["input_ids"].shape
    real = batch.get("attention_mask", torch.ones(rows, length, dtype=torch.long))
    batch["position_ids"] = 10 + (real.cumsum(1) - 1).clamp(min=0)
    found = output(model, batch)
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(values(model)):
        cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
    whole = torch.cat([torch.ones(rows, 10, dtype=torch.long), real], 1) if mask == "left" else None
    with inlay.use(model):
        expected = output(model, {**batch, "past_key_values": cache, "attention_mask": whole})
        assert not torch.allclose(expected, output(model, batch))
    torch.testing.assert_close(found[real == 1], expected[real == 1], **DOUBLE)


def test_prefix_tokens_have_no_positions() -> None:
    for family in ("llama", "bert", "t5"):
        model, batch = adapted(family, PrefixTuning(reparam=False))
        before = output(model, batch)
        order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
        for _, delta in adapter(model).placed:
            delta.key.data, delta.value.data = delta.key.data[:, order], delta.value.data[:, order]
        torch.testing.assert_close(output(model, batch), before, **DOUBLE)
        adapter(model).placed[0][1].key.data.neg_()
        assert not torch.allclose(output(model, batch), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
def test_a_zero_prefix_is_not_the_base_but_an_inactive_one_is(family: str) -> None:
    model = build(family)
    batch = batch_for(model)
    before = output(model, batch)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert not PrefixTuning().starts_as_identity
    inlay.attach(model, PrefixTuning(reparam=False))
    for _, delta in adapter(model).placed:
        delta.key.data.zero_(), delta.value.data.zero_()
    assert (output(model, batch) - before).abs().max() > 1e-5
    with inlay.use(model):
        assert torch.equal(output(model, batch), before)
    inlay.detach(model)
    assert torch.equal(output(model, batch), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# -- encoder-decoders ------------------------------------------------------------------------------


def test_an_encoder_decoder_has_three_kinds_of_site_with_a_generator_each() -> None:
    model, batch = adapted("t5", PrefixTuning(hidden=16), num_decoder_layers=3)
    shared = adapter(model).shared
    assert {n: g.up.shape[0] for n, g in shared.items()} == {
        "encoder_self": 2 * 2 * 32, "decoder_self": 3 * 2 * 32, "decoder_cross": 3 * 2 * 32,
    }  # fmt: skip
    assert not torch.equal(shared["decoder_self"].table, shared["decoder_cross"].table)
    before = output(model, batch)
    for name, generator in shared.items():
        kept = generator.up_bias.data.clone()
        generator.up_bias.data += 1
        assert (output(model, batch) - before).abs().max() > 1e-6, name
        generator.up_bias.data = kept
    assert torch.equal(output(model, batch), before)


def test_the_encoder_and_cross_attention_can_be_left_out() -> None:
    model = build("t5")

    def kinds(**settings: bool) -> set[tuple[str, bool]]:
        sites = inlay.plan(model, PrefixTuning(**settings)).parts[0].sites
        return {(site.side, site.cross) for site in sites}

    own = ("decoder", False)
    assert kinds() == {own, ("encoder", False), ("decoder", True)}
    assert kinds(cross_prefix=False) == {own, ("encoder", False)}
    assert kinds(encoder_prefix=False) == {own, ("decoder", True)}
    assert kinds(encoder_prefix=False, cross_prefix=False) == {own}
    assert inlay.plan(build("bert"), PrefixTuning(encoder_prefix=False)).parts[0].sites
    with pytest.raises(TargetError, match="let cross_prefix and encoder_prefix allow"):
        inlay.plan(model, PrefixTuning(targets=["cross_attention"], cross_prefix=False))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_t5_does_not_see_padding_and_keeps_its_relative_positions(implementation: str) -> None:
    model, batch = adapted("t5", PrefixTuning(hidden=16), attn_implementation=implementation)
    labels, ids = batch["labels"][:1], batch["input_ids"][:1]
    before = output(model, {"input_ids": ids, "labels": labels})
    for side in ((3, 0), (0, 3)):
        mask = nn.functional.pad(torch.ones_like(ids), side)
        padded_ids = nn.functional.pad(ids, side)
        found = output(model, {"input_ids": padded_ids, "attention_mask": mask, "labels": labels})
        torch.testing.assert_close(found, before, **DOUBLE)


# -- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "where",
    [("llama", "sdpa"), ("llama", "eager"), ("t5", "sdpa"), ("mistral", "sdpa"), ("mistral", "eager")],
)
def test_greedy_generation_is_the_same_with_any_cache(form: str, where: tuple[str, str]) -> None:
    model = lively(where[0], attn_implementation=where[1])  # mistral: a window shorter than the prompt
    inlay.attach(model, FORMS[form], seed=3)
    for batch in (padded(model), {"input_ids": padded(model)["input_ids"][1:]}):
        cached = model.generate(**batch, **GREEDY)
        assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False), cached)
        assert torch.equal(model.generate(**batch, **GREEDY, cache_implementation="static"), cached)
        with inlay.use(model):
            assert not torch.equal(model.generate(**batch, **GREEDY), cached)


def test_cached_generation_equals_argmax_of_full_forwards() -> None:
    model = build("llama")
    inlay.attach(model, PrefixTuning(hidden=16), seed=3)
    batch = padded(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(8):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        full = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        following = output(model, full)[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    assert torch.equal(model.generate(**batch, **GREEDY), ids)


def test_beams_and_the_generator_computed_once_per_generation() -> None:
    model = build("llama")
    inlay.attach(model, PrefixTuning(hidden=16), seed=3)
    calls: list[int] = []
    adapter(model).shared["self"].register_forward_hook(lambda *_: calls.append(1))
    batch = padded(model)
    cached = model.generate(**batch, **GREEDY, num_beams=3)
    assert len(calls) == 1
    assert torch.equal(model.generate(**batch, **GREEDY, num_beams=3, use_cache=False), cached)


# -- refusals --------------------------------------------------------------------------------------


def test_says_why_it_cannot_be_merged() -> None:
    model = build("llama")
    inlay.attach(model, PrefixTuning(hidden=16))
    with pytest.raises(inlay.CannotMerge, match="take part in the softmax"):
        inlay.merge(model)


def test_refuses_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match="length=0"):
        PrefixTuning(0)
    with pytest.raises(ConfigError, match=r"dropout=1\.0"):
        PrefixTuning(dropout=1.0)
    assert PrefixTuning(**FORMS["flat"].to_dict()) == FORMS["flat"]
