"""Fused projections: each slice is what its role says, shown by what the attention does without it.

Without its values an attention gives the same for every input; without its queries its keys do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.anatomy import Anatomy
from inlay.sites import ModuleSite, Slice
from inlay.testing.tools import distance, shake

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
       "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FALCON = {**SIZES, "alibi": False, "parallel_attn": True, "bias": True}
LATENT = {**SIZES, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
          "qk_nope_head_dim": 6, "v_head_dim": 10, "first_k_dense_replace": 2, "head_dim": 4}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    "glm": ("GlmConfig", "GlmForCausalLM", {**SIZES, "num_key_value_heads": 2, "head_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**SIZES, "n_head": 4, "n_layer": 2}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**FALCON, "multi_query": False}),
    "falcon, one key": ("FalconConfig", "FalconForCausalLM", {**FALCON, "multi_query": True}),
    "falcon, groups": ("FalconConfig", "FalconForCausalLM",
                       {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**GPT, "rotary_dim": 4, "n_ctx": 64}),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {**GPT, "multi_query": True}),
    "gpt_bigcode, all keys": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {**GPT, "multi_query": False}),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", SIZES),
    "mpt": ("MptConfig", "MptForCausalLM", {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2}),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM",
                   {**SIZES, "cls_token_id": 1, "sep_token_id": 2}),
    "deberta": ("DebertaConfig", "DebertaForMaskedLM", SIZES),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", LATENT),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", MODELS)


def built(name: str) -> nn.Module:
    config, kind, settings = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings, initializer_range=0.2)
    return getattr(transformers, kind)(made).eval()


def slices(model: nn.Module, role: str) -> list[ModuleSite]:
    return [s for s in Anatomy(model).leaves if s.role == role]


def rows(site: ModuleSite) -> list[Tensor]:
    """Return the site's weight and bias, as views or copies, with the way to write them back."""
    weight = site.module.weight
    return [weight, *([site.module.bias] if site.has_bias else [])]


def change(site: ModuleSite, how: Callable[[Tensor], Tensor]) -> None:
    """Put how(tensor) in the place of the site's weight and bias."""
    with torch.no_grad():
        for tensor in rows(site):
            dim = 1 if site.layer_kind == "conv1d" and tensor.dim() == 2 else 0
            part = site.part or Slice(0, tensor.shape[dim])
            tensor.copy_(part.put(tensor, how(part.take(tensor, dim)), dim))


def attention_output(model: nn.Module, ids: Tensor) -> Tensor:
    """Return what the first block's attention gives before its output projection."""
    site = slices(model, "output")[0]
    seen: list[Tensor] = []
    handle = site.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]


def tokens(seed: int) -> Tensor:
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(seed))


@ALL
def test_without_values_the_input_does_not_matter(name: str) -> None:
    model = built(name)
    assert distance(attention_output(model, tokens(0)), attention_output(model, tokens(1))) > 0.1
    change(slices(model, "value")[0], torch.zeros_like)
    one, other = attention_output(model, tokens(0)), attention_output(model, tokens(1))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one[0, 0].expand_as(one), one)  # at no place


@ALL
def test_without_queries_the_keys_do_not_matter(name: str) -> None:
    """A latent attention's keys have rotary parts of their own; its queries hold all that meets them."""
    model = built(name)
    before = attention_output(model, tokens(0))
    change(slices(model, "query")[0], torch.zeros_like)
    without = attention_output(model, tokens(0))
    assert distance(without, before) > 1e-3
    change(slices(model, "key")[0], lambda part: torch.randn_like(part))
    torch.testing.assert_close(attention_output(model, tokens(0)), without)


@ALL
def test_lora_on_queries_and_values_acts_learns_and_merges(name: str) -> None:
    model = built(name)
    keys, ids = slices(model, "key")[0], tokens(0)
    inlay.attach(model, "lora(rank=2)")
    shake(model)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
    with inlay.use(model), torch.no_grad():
        assert distance(adapted, model(input_ids=ids).logits) > 1e-3
    model(input_ids=ids).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    part = keys.part or Slice(0, keys.out_features)
    dim = 1 if keys.layer_kind == "conv1d" else 0
    before = part.take(keys.module.weight, dim).clone()
    report = inlay.merge(model, undo=False)
    assert report.worst < 1e-4
    assert torch.equal(part.take(keys.module.weight, dim), before)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)


def test_slices_take_and_put() -> None:
    whole = torch.arange(12.0)
    part = Slice(1, 3, groups=3)
    assert part.size == 6
    assert part.take(whole, 0).tolist() == [1, 2, 5, 6, 9, 10]
    assert part.put(whole, torch.zeros(6), 0).tolist() == [0, 0, 0, 3, 4, 0, 0, 7, 8, 0, 0, 11]
    assert Slice(2, 5).take(whole, 0).tolist() == [2, 3, 4]
    assert Slice(2, 5).put(whole, -torch.ones(3), 0)[1:6].tolist() == [1, -1, -1, -1, 5]
    assert part.take(whole.view(1, 12), -1).shape == (1, 6)


def test_gpt2_cross_attention_has_its_queries_in_a_layer_of_their_own() -> None:
    config = transformers.GPT2Config(**GPT, add_cross_attention=True)
    sites = [s for s in Anatomy(transformers.GPT2LMHeadModel(config)).leaves if s.cross]
    found = {(s.role, s.name.rsplit(".", 1)[-1], s.out_features) for s in sites if s.layer == 0}
    assert found == {
        ("key", "c_attn[key]", 32), ("value", "c_attn[value]", 32), ("query", "q_attn", 32),
        ("output", "c_proj", 32),
    }  # fmt: skip
