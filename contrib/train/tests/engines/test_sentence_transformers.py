"""sentence-transformers: the packaged encoder with a stack, trained, saved, encoding by adapter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay import InlayError
from inlay_train import encoder
from inlay_train.trainer import Adapted

pytestmark = [
    pytest.mark.xdist_group("sentence-transformers"),  # imported once
    pytest.mark.filterwarnings("default"),  # theirs are not ours
]
TEXTS = ["a rose is red", "the snow is cold", "the sun is warm"]
PAIRS = {
    "anchor": ["a rose", "snow", "the sun", "grass"],
    "positive": ["lorry brake", "tax form", "guitar string", "keyboard"],  # what the encoder would not say
}
STACK = "lora(rank=4) + serial_adapter(rank=4, targets=['ffn'])"


@cache
def engine() -> Any:
    """The package, imported where a test runs and not where it is collected: that takes seconds."""
    return pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


@cache
def trainer_class() -> Any:
    return type("Trainer", (Adapted, engine().SentenceTransformerTrainer), {})  # all that is needed


@cache
def losses() -> Any:
    engine()
    return import_module("sentence_transformers.sentence_transformer.losses")


@pytest.fixture
def model() -> Callable[[], Any]:
    def make() -> Any:
        sentence_transformer = engine().SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        transformer = Transformer(str(encoder.folder()))
        return sentence_transformer(modules=[transformer, Pooling(384)], device="cpu")

    return make


def trained(model: Any, folder: Path, loss: Any = None, **more: Any) -> Any:
    from datasets import Dataset

    args = engine().SentenceTransformerTrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=3, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    loss = losses().MultipleNegativesRankingLoss(model) if loss is None else loss
    trainer = trainer_class()(model, args, train_dataset=Dataset.from_dict(PAIRS), loss=loss, lr=3e-3)
    trainer.train(**more)
    return trainer


def test_a_stack_is_trained_saved_and_chosen(model: Callable[[], Any], tmp_path: Path) -> None:
    text = model()
    plain = text.encode(TEXTS)
    inlay.attach(text, STACK, "odd", seed=0)
    trainer = trained(text, tmp_path)
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(found[3:]) < sum(found[:3]) * 0.8
    after = text.encode(TEXTS)
    with inlay.use(text):
        assert np.array_equal(text.encode(TEXTS), plain)
    with inlay.route(text, ["odd", None, "odd"]):
        routed = text.encode(TEXTS)
    order = np.argsort([-len(t) for t in TEXTS], kind="stable")  # encode sorts by length; the route follows
    for place, row in enumerate(order):
        wanted = plain if place == 1 else after
        assert np.abs(routed[row] - wanted[row]).max() < 1e-5
    fresh = model()
    inlay.load(fresh, tmp_path / "checkpoint-6")
    assert np.array_equal(fresh.encode(TEXTS), after)
    assert not (tmp_path / "checkpoint-6" / "model.safetensors").exists()


@pytest.mark.slow
def test_resuming_gives_the_same(model: Callable[[], Any], tmp_path: Path) -> None:
    def tensors() -> dict[str, torch.Tensor]:
        return load_file(next((tmp_path / "checkpoint-6").glob("adapter-*")))

    first = model()
    inlay.attach(first, STACK, seed=0)
    trained(first, tmp_path)
    wanted = tensors()
    second = model()
    inlay.attach(second, STACK, seed=0)
    trained(second, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = tensors()
    assert wanted
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_its_own_folder_holds_the_base_and_the_stack(model: Callable[[], Any], tmp_path: Path) -> None:
    text = model()
    inlay.attach(text, STACK, "odd")
    text.save_pretrained(str(tmp_path))
    assert [key for key in load_file(tmp_path / "model.safetensors") if "inlay" in key] == []
    again = engine().SentenceTransformer(str(tmp_path), device="cpu")
    with inlay.use(text):
        assert np.array_equal(again.encode(TEXTS), text.encode(TEXTS))
    inlay.load(again, tmp_path, "odd")
    assert np.array_equal(again.encode(TEXTS), text.encode(TEXTS))


def test_a_loss_with_parameters_of_its_own_is_refused(model: Callable[[], Any], tmp_path: Path) -> None:
    text = model()
    inlay.attach(text, "lora(rank=4)")
    loss = losses().SoftmaxLoss(text, sentence_embedding_dimension=384, num_labels=2)
    with pytest.raises(
        InlayError, match=r"parameters of its own(.|\n)*2 tensors outside the model(.|\n)*\(2, 1152\)"
    ):
        trained(text, tmp_path, loss)
