"""transformers.pipeline with an adapted model: one text, batches, and adapters chosen around the call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import inlay
from inlay.testing.tools import shake
from inlay_train import encoder, loading

TEXTS = ["it is a good day", "she is so", "the day was we"]
Pipe = Callable[..., Any]


@pytest.fixture
def pipe(models: dict[str, Path]) -> Pipe:
    """Return a function that makes a pipeline for a task, of a model with a stack that has learned."""

    def make(task: str, kind: str, family: str = "llama", stack: str = "lora(rank=4) + ia3()") -> Any:
        torch.manual_seed(0)
        model = getattr(transformers, kind).from_pretrained(models[family], num_labels=3).eval()
        inlay.attach(model, stack, "fr")
        shake(model)
        return transformers.pipeline(
            task, model=model, tokenizer=loading.tokenizer(models[family]), device="cpu"
        )

    return make


def test_text_generation_follows_the_adapter(pipe: Pipe) -> None:
    made = pipe("text-generation", "AutoModelForCausalLM", stack="lora(rank=4) + prefix_tuning(length=3)")

    def texts(**more: Any) -> list[str]:
        found = made(TEXTS, max_new_tokens=6, max_length=None, do_sample=False, **more)
        return [each[0]["generated_text"] for each in found]

    adapted = texts()
    assert texts(batch_size=3) == adapted
    with inlay.use(made.model):
        base = texts()
    assert base != adapted
    inlay.detach(made.model)
    assert texts() == base


def test_text_classification_gives_the_adapters_scores(pipe: Pipe) -> None:
    made = pipe("text-classification", "AutoModelForSequenceClassification", "bert")
    found = made(TEXTS, top_k=None, batch_size=2)
    batch = made.tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = made.model(**batch).logits.softmax(-1)
    for row, scores in zip(wanted, found, strict=True):
        named = {each["label"]: each["score"] for each in scores}
        assert [named[f"LABEL_{i}"] for i in range(3)] == pytest.approx(row.tolist(), abs=1e-5)
    with inlay.use(made.model):
        assert made(TEXTS, top_k=None, batch_size=2) != found


def test_features_of_the_packaged_encoder_by_adapter() -> None:
    model = transformers.AutoModel.from_pretrained(encoder.folder()).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder.folder())
    made = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")
    plain = made(TEXTS, return_tensors=True)
    inlay.attach(model, "lora(rank=4)", "fr")
    shake(model)
    adapted = made(TEXTS, return_tensors=True)
    with inlay.use(model):
        assert all(torch.equal(a, b) for a, b in zip(made(TEXTS, return_tensors=True), plain, strict=True))
    with inlay.route(model, ["fr", None, "fr"]):
        routed = made(TEXTS, return_tensors=True, batch_size=3, tokenize_kwargs={"padding": True})
    for i, row in enumerate(routed):
        wanted = plain[i] if i == 1 else adapted[i]
        torch.testing.assert_close(row[:, : wanted.shape[1]], wanted, rtol=0, atol=1e-4)
