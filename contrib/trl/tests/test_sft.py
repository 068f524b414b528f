"""Supervised training with TRL: packed rows, answers only, the head, new tokens, resuming."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import inlay
from inlay import InlayError
from inlay.errors import CheckpointError, TrainingError
from inlay.testing.snapshots import differences, snapshot
from inlay.testing.tools import shake

pytestmark = [
    pytest.mark.xdist_group("trl"),  # imported once
    pytest.mark.filterwarnings("default"),  # theirs are not ours
]
SLOW = pytest.mark.slow
Made = Callable[..., Any]


@pytest.fixture
def made(trl: Any, inlay_trl: Any, decoder: Made, tokenizer: Any, settings: Made, chats: Any) -> Made:
    """Return a function that makes an SFTTrainer of the decoder with a stack, or of a model given."""

    def make(
        stack: Any = "lora(rank=4)", *, model: Any = None, train: tuple[str, ...] = (), rows: Any = chats,
        output: str = "out", text: Any = tokenizer, lr: float | None = None, **changes: Any,
    ) -> Any:  # fmt: skip
        if model is None:
            model = decoder()
            inlay.attach(model, stack, "chat", train=train, seed=0)
        args = trl.SFTConfig(**settings(output, **changes))
        return inlay_trl.SFTTrainer(model, args, train_dataset=rows, processing_class=text, lr=lr)

    return make


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("adapter-*.safetensors")))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def log_probs(trainer: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    """Return what the trainer reads: the log-probability of each next token, with TRL's head at work."""
    with trainer._at_work(), torch.no_grad():
        return trainer.model(**batch, labels=batch["input_ids"], fused_lm_head=True, **more).log_probs


def own_log_probs(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logs = model(input_ids=ids).logits.log_softmax(-1)
    return logs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def test_it_learns_and_its_checkpoints_hold_the_adapter_alone(made: Made, decoder: Made) -> None:
    model = decoder()
    before, kind = {n: t.clone() for n, t in model.state_dict().items()}, type(model)
    inlay.attach(model, "lora(rank=4)", seed=0)
    trainer = made(model=model, max_steps=8, lr=0.1)
    trainer.train()
    first, last = losses(trainer)[:4], losses(trainer)[4:]  # an epoch each
    assert sum(last) / 4 < sum(first) / 4 - 0.1
    folder = Path(trainer.args.output_dir) / "checkpoint-8"
    names = {f.name for f in folder.iterdir()}
    assert {"inlay.json", "optimizer.pt", "trainer_state.json"} <= names
    assert not any(
        f.suffix in (".bin", ".safetensors") and not f.name.startswith("adapter-") for f in folder.iterdir()
    )
    fresh = decoder()
    inlay.load(fresh, folder, "again")
    ids = torch.arange(3, 12)[None]
    assert torch.equal(fresh.eval()(ids).logits, trainer.model.eval()(ids).logits)
    inlay.detach(model)
    now = model.state_dict()
    assert type(model) is kind
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.slow
def test_resuming_gives_the_same(made: Made) -> None:
    trainer = made("lora(rank=4, dropout=0.1)")
    trainer.train()
    wanted = tensors(Path(trainer.args.output_dir) / "checkpoint-4")
    torch.manual_seed(5)
    again = made("lora(rank=4, dropout=0.1)")
    again.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    found = tensors(Path(trainer.args.output_dir) / "checkpoint-4")
    assert wanted
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_between_its_runs_the_model_has_its_own_forward(made: Made, chats: Any) -> None:
    """TRL leaves its head in front of the model's forward for good: nothing more could be attached."""
    trainer = made()
    assert "forward" not in trainer.model.__dict__
    trainer.train()
    assert "forward" not in trainer.model.__dict__
    loss = trainer.evaluate(chats)["eval_loss"]
    inlay.attach(trainer.model, "ia3()", "second", activate=False)
    inlay.merge(trainer.model, "chat")
    assert trainer.evaluate(chats)["eval_loss"] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(
    "stack",
    [
        pytest.param("lora(rank=4)", marks=SLOW),
        "lora(rank=2) + prefix_tuning(length=3)",
        "prompt_tuning(length=3)",
        pytest.param("serial_adapter(rank=4) + ia3()", marks=SLOW),
    ],
)
def test_packed_texts_do_not_see_each_other(made: Made, stack: str) -> None:
    """Each text of a packed row gets what it gets alone: prefixes and prompts stand before every one."""
    trainer = made(stack, packing=True, max_length=48)
    shake(trainer.model)
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert "attention_mask" not in batch
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) >= 2
    found = log_probs(trainer, {k: v for k, v in batch.items() if k != "labels"})[0]
    for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
        alone = own_log_probs(trainer.model, batch["input_ids"][:, start:end])[0]
        torch.testing.assert_close(found[start : end - 1], alone, rtol=0, atol=2e-5)
    trainer.train()
    assert len(losses(trainer)) == 4


def test_only_the_answers_are_learned(made: Made, tokenizer: Any) -> None:
    trainer = made(assistant_only_loss=True, max_steps=8, lr=0.01)
    row = trainer.train_dataset[0]
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "a rose is red . <end>"
    trainer.train()
    assert sum(losses(trainer)[4:]) < sum(losses(trainer)[:4])


@pytest.mark.parametrize("how", [pytest.param("head", marks=SLOW), pytest.param("lora", marks=SLOW), "both"])
def test_an_adapter_on_the_head_acts_and_learns(made: Made, how: str) -> None:
    """TRL multiplies by lm_head.weight, past any adapter there, and refuses peft's."""
    stack = (
        "lora(rank=2, targets=['query'])" if how == "head" else "lora(rank=2, targets=['query', 'lm_head'])"
    )
    trainer = made(stack, train=("head",) if how != "lora" else (), assistant_only_loss=True)
    shake(trainer.model)
    ids = torch.arange(3, 15).reshape(2, 6)
    trainer.model.eval()
    torch.testing.assert_close(
        log_probs(trainer, {"input_ids": ids}), own_log_probs(trainer.model, ids), rtol=0, atol=1e-5
    )
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    heads = [n for n in before if n.startswith("lm_head")]
    now = dict(trainer.model.named_parameters())
    assert heads
    assert all(not torch.equal(before[n], now[n]) for n in heads)


def test_the_whole_heads_figures_are_trls(made: Made) -> None:
    """On a model without a stack, TRL's fused head and ours say the same of every token."""
    from inlay_trl import head

    trainer = made("ia3()")
    model, ids = trainer.model.eval(), torch.arange(3, 15).reshape(2, 6)
    labels = torch.where(ids % 4 == 0, -100, ids)
    with trainer._at_work(), torch.no_grad():
        theirs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    head.put_whole_head(model)
    with torch.no_grad():
        ours = model(input_ids=ids, labels=labels, fused_lm_head=True)
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
    assert "logits" in model(input_ids=ids)


def test_a_template_that_brings_tokens_comes_before_the_stack(
    trl: Any, decoder: Made, made: Made, tokenizer: Any, other_tokenizer: Path, tmp_path: Path
) -> None:
    """Resize, attach, train, save, load: the new rows of embedding and head learn, and come back."""
    model, size = decoder(), len(tokenizer)
    model, text, added = trl.clone_chat_template(model, tokenizer, str(other_tokenizer), None)
    assert sorted(added) == [size, size + 1]
    inlay.attach(model, "lora(rank=4)", "chat", train=("embedding", "head"))
    rows = torch.cat([model.model.embed_tokens.weight[size:], model.lm_head.weight[size:]]).clone()
    trainer = made(model=model, text=text, lr_scheduler_type="constant")
    trainer.train()
    assert torch.equal(rows, torch.cat([model.model.embed_tokens.weight[size:], model.lm_head.weight[size:]]))
    inlay.save(model, tmp_path / "saved")
    ids = torch.tensor([[5, 6, size, size + 1]])
    fresh = decoder()
    with pytest.raises(CheckpointError, match="made for a base of another shape"):
        inlay.load(fresh, tmp_path / "saved")
    torch.manual_seed(77)  # other new rows than at training
    fresh, _, _ = trl.clone_chat_template(fresh, text, str(other_tokenizer), None)
    with warnings.catch_warnings(action="error"):
        inlay.load(fresh, tmp_path / "saved")
    assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)
    with inlay.use(model):
        assert not torch.equal(fresh(ids).logits, model(ids).logits)
    assert tokenizer.convert_ids_to_tokens(size) in text.get_vocab()


def test_new_rows_that_do_not_learn_belong_to_the_base(
    trl: Any, decoder: Made, tokenizer: Any, other_tokenizer: Path, tmp_path: Path
) -> None:
    """They are not in the adapter, so loading it tells of a base that has others."""
    model, _, _ = trl.clone_chat_template(decoder(), tokenizer, str(other_tokenizer))
    inlay.attach(model, "lora(rank=4)")
    model.save_pretrained(tmp_path / "both")
    fresh = decoder()
    fresh.resize_token_embeddings(model.config.vocab_size, mean_resizing=False)
    fresh.config = model.config
    with pytest.warns(UserWarning, match="other values than the base it was trained on"):
        inlay.load(fresh, tmp_path / "both")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "both")
    with warnings.catch_warnings(action="error"):
        inlay.load(again, tmp_path / "both")


def test_a_template_that_resizes_an_adapted_model_is_refused(
    decoder: Made, made: Made, other_tokenizer: Path, tmp_path: Path
) -> None:
    model = decoder()
    inlay.attach(model, "lora(rank=4)")
    before = snapshot(model)
    with pytest.raises(
        InlayError, match=r"may resize the vocabulary comes after attaching(.|\n)*chat_template_path='.*other"
    ) as caught:
        made(model=model, chat_template_path=str(other_tokenizer))
    assert "clone_chat_template(model, tokenizer, path) first" in str(caught.value)
    assert differences(before, model) == []
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0]['content'] }}")
    assert made(model=model, chat_template_path=str(file)).processing_class.chat_template == file.read_text()


def test_rows_added_under_a_trained_embedding_are_caught_at_the_first_step(made: Made) -> None:
    trainer = made("lora(rank=4)", train=("embedding",))
    trainer.model.resize_token_embeddings(trainer.model.config.vocab_size + 2)
    with pytest.raises(TrainingError, match="replaced or resized after attaching"):
        trainer.train()


def test_a_model_yet_to_be_loaded_is_refused(made: Made) -> None:
    with pytest.raises(InlayError, match=r"yet to be loaded(.|\n)*saw: model='llama-7b'"):
        made(model="llama-7b")


@pytest.mark.slow
def test_mixed_precision_stands_in_front_of_trls_head(made: Made, chats: Any) -> None:
    """In training, in evaluations after it, and gone between; a second training puts it there again."""
    trainer = made("lora(rank=4)", train=("head",), bf16=True)
    whole = made("lora(rank=4)", train=("head",), output="whole")
    trainer.train()
    whole.train()
    assert losses(trainer)[0] == pytest.approx(losses(whole)[0], abs=0.05)
    assert losses(trainer)[0] != losses(whole)[0]
    assert "forward" not in trainer.model.__dict__
    first = trainer.evaluate(chats)["eval_loss"]
    inlay.attach(trainer.model, "ia3()", "second", activate=False, trainable=False)
    assert trainer.evaluate(chats)["eval_loss"] == first
