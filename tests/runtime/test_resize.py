"""`resize_token_embeddings` after attaching replaces or resizes layers under their adapters: caught."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import AttachError, CheckpointError, TrainingError
from inlay.testing.models import VOCABULARY, batch_for
from inlay.testing.tools import distance, lively, shake

pytest.importorskip("transformers")

MORE = VOCABULARY + 8
HIT = [
    ("llama", "model.embed_tokens", "trained"),
    ("llama", "model.embed_tokens", "lora"),
    ("llama", "lm_head", "lora"),
    ("llama", "lm_head", "trained"),
    ("gpt2", "transformer.wte", "lora"),
    ("gpt2", "lm_head", "lora"),
    ("bert", "bert.embeddings.word_embeddings", "lora"),
    ("t5", "encoder.embed_tokens", "lora"),
]


def resized(model: nn.Module) -> None:
    torch.manual_seed(0)  # the new rows are random
    model.resize_token_embeddings(MORE, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape[0] == MORE


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(**batch_for(model, labels=True)).loss.backward()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch_for(model)).logits


@pytest.mark.parametrize(("family", "target", "method"), HIT)
def test_a_resized_site_is_caught_when_checking_training(family: str, target: str, method: str) -> None:
    model = lively(family)
    inlay.attach(model, f"{method}(targets=['{target}']) + ia3()")
    backward(model)
    inlay.check_training(model)
    resized(model)
    shown = target.replace(".", r"\.")
    with pytest.raises(
        TrainingError, match=rf"replaced or resized after attaching(.|\n)*saw: {shown} "
    ) as caught:
        inlay.check_training(model)
    assert "resize_token_embeddings" in str(caught.value)
    with pytest.raises(AttachError, match=rf"lost its place in the model(.|\n)*saw: {shown} "):
        inlay.attach(model, "lora(rank=2)", name="second")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_adapters_elsewhere_go_on_as_before(family: str) -> None:
    model = lively(family)
    inlay.attach(model, "lora(rank=4) + prefix_tuning(length=3, hidden=16) + serial_adapter(rank=4)")
    shake(model)
    before = logits(model)
    resized(model)
    after = logits(model)
    assert distance(after[..., : before.shape[-1]], before) < 1e-5
    backward(model)
    inlay.check_training(model)
    inlay.detach(model)
    plain = lively(family)
    assert distance(logits(model)[..., : before.shape[-1]], logits(plain)) < 1e-5


@pytest.mark.parametrize(("family", "target", "method"), HIT)
def test_a_resized_model_still_lets_go(family: str, target: str, method: str) -> None:
    model, plain = lively(family), lively(family)
    inlay.attach(model, f"{method}(targets=['{target}'])")
    resized(model)
    inlay.detach(model)
    width = logits(plain).shape[-1]
    assert distance(logits(model)[..., :width], logits(plain)) < 1e-5
    assert [n for n, m in model.named_modules() if hasattr(m, "_inlay_port")] == []


def test_a_checkpoint_is_for_the_size_it_was_made_for(tmp_path: Path) -> None:
    """Loading asks for the same shapes of the base: resize first, then load."""
    model = lively("llama")
    inlay.attach(model, "lora(rank=4)")
    shake(model)
    inlay.save(model, tmp_path / "small")
    fresh = lively("llama")
    resized(fresh)
    with pytest.raises(CheckpointError, match="made for a base of another shape"):
        inlay.load(fresh, tmp_path / "small")
    resized(model)
    inlay.save(model, tmp_path / "large")
    inlay.load(fresh, tmp_path / "large")
    assert distance(logits(fresh)[..., :VOCABULARY], logits(model)[..., :VOCABULARY]) < 1e-5
