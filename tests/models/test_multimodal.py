"""Vision, images with text, speech: adapters on one tower, on both, and what each of them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.testing.tools import distance, shake

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
          "image_size": 16, "patch_size": 8}  # fmt: skip
STACK = "lora(rank=2, targets=['query', 'value', 'up']) + serial_adapter + ssf(targets=['norm'])"


def clip() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    return transformers.CLIPModel(config), {"input_ids": words(), "pixel_values": torch.randn(2, 3, 16, 16)}


def llava() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, num_key_value_heads=2),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=63,
    )
    ids = torch.cat([torch.full((2, 4), 63), words()], 1)
    model = transformers.LlavaForConditionalGeneration(config)
    return model, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=10,
        max_target_positions=20, bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": words()}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)), {
        "pixel_values": torch.randn(2, 3, 16, 16)
    }


MODELS = {"clip": clip, "llava": llava, "whisper": whisper, "vit": vit}


def words() -> Tensor:
    return torch.tensor([[5, 6, 7, 2], [8, 9, 10, 2]])


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model.eval(), batch


def result(model: Any, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    found: Tensor = out.logits if "logits" in out else out.logits_per_image
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_stack_on_all_towers_acts_learns_and_merges(name: str) -> None:
    model, batch = built(name)
    base = result(model, batch).detach()
    stack = STACK.replace("'query', 'value', 'up'", "'both.query', 'both.value', 'both.up'")
    inlay.attach(model, stack)
    shake(model)
    adapted = result(model, batch)
    assert distance(adapted, base) > 1e-4
    adapted.square().sum().backward()
    still = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    if name == "llava":  # reads what its vision tower gives below the last layer
        still = [n for n in still if "vision_tower.encoder.layers.1." not in n and "post_layernorm" not in n]
    assert not still
    inlay.merge(model, ["default/lora"])
    torch.testing.assert_close(result(model, batch), adapted, rtol=1e-3, atol=1e-4)
    inlay.detach(model)
    assert torch.equal(result(model, batch), base)


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("llava", "vision_tower"),
        ("llava", "language_model"),
        ("clip", "text_model"),
        ("clip", "vision_model"),
    ],
)
def test_one_tower_only(name: str, tower: str) -> None:
    model, batch = built(name)
    base = result(model, batch).detach()
    plan = inlay.attach(model, f"lora(rank=2, targets=['*{tower}*.q_proj', '*{tower}*.v_proj'])")
    assert len(plan.parts[0].sites) == 4
    assert all(tower in site.name for site in plan.parts[0].sites)
    shake(model)
    assert distance(result(model, batch), base) > 1e-5


@pytest.mark.parametrize("name", ["llava", "whisper"])
def test_generation_with_keys_values_and_lora_is_what_the_forward_says(name: str) -> None:
    model, batch = built(name)
    inlay.attach(model, "lora(rank=2) + prefix_tuning(length=3, hidden=8)")
    shake(model)
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    cached, plain = (model.generate(**batch, **options, use_cache=use) for use in (True, False))  # type: ignore[operator]
    assert torch.equal(cached, plain)
