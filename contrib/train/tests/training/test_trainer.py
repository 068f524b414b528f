"""The Trainer: checkpoints hold what learns, extra losses count once, and the best step comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from torch import Tensor

import inlay
from inlay import InlayError
from inlay.authoring import Adapter, Method, OutputDelta, hookimpl, register
from inlay.registry import registry
from inlay.testing.refusal import refused
from inlay_train.trainer import Trainer

Made = Callable[..., Trainer]
Llama = Callable[[], Any]


class Plus(OutputDelta):
    """y + b"""

    def __init__(self, site: Any, init: Any) -> None:
        super().__init__()
        self.b = init.zeros(site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return self.b


@dataclass(frozen=True)
class Penalised(Method):
    """A bias with an extra loss of -Σb: without it, the bias of an unused output would not move."""

    id: ClassVar[str] = "penalised"

    def delta(self, site: Any, init: Any) -> Plus:
        return Plus(site, init)

    @staticmethod
    @hookimpl
    def auxiliary_loss(method: Method, adapter: Adapter) -> Tensor:
        return -torch.stack([p.sum() for _, p in adapter.named_parameters()]).sum()


@pytest.fixture
def penalised() -> Any:
    yield register(Penalised)
    registry.forget(Penalised)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("adapter-*.safetensors")))


def test_a_checkpoint_holds_the_adapter_and_not_the_base(made: Made, llama: Llama) -> None:
    trainer = made()
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-6"
    names = {f.name for f in folder.iterdir()}
    assert {"inlay.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert not {"model.safetensors", "tokenizer.json", "training_args.bin"} & names
    fresh = llama()
    inlay.load(fresh, folder, "again")
    batch = {"input_ids": torch.arange(4, 12)[None]}
    trainer.model.eval()
    assert torch.equal(fresh.eval()(**batch).logits, trainer.model(**batch).logits)


def test_each_part_learns_at_its_methods_own_rate(made: Made) -> None:
    trainer = made("lora(rank=2) + ia3()", rate=0.5)
    optimizer = trainer.create_optimizer()
    own = {group["name"]: group["lr"] for group in inlay.parameter_groups(trainer.model)}
    assert len(own) == 2
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        n: r / 2 for n, r in own.items()
    }
    assert {g["lr"] for g in made(output="b", lr=3e-4).create_optimizer().param_groups} == {3e-4}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_extra_losses_are_added_once_per_step(made: Made, penalised: Any, accumulate: int) -> None:
    """SGD, rate 1, one step: the bias moves by its gradient, in which the extra term is exactly -1."""
    moved = []
    for stack in (Penalised(targets=("query",)), Plain(targets=("query",))):
        with_plain = stack.id == "plain"
        if with_plain:
            register(Plain)
        try:
            trainer = made(
                stack, output=stack.id, lr=1.0, max_steps=1, optim="sgd", lr_scheduler_type="constant",
                max_grad_norm=0.0, gradient_accumulation_steps=accumulate, eval_strategy="no",
            )  # fmt: skip
            trainer.train()
            moved.append(
                [t for _, t in sorted(tensors(Path(trainer.args.output_dir) / "checkpoint-1").items())]
            )
        finally:
            if with_plain:
                registry.forget(Plain)
    for mine, theirs in zip(*moved, strict=True):
        torch.testing.assert_close(mine - theirs, torch.ones_like(mine), rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Plain(Method):
    """The same bias without the extra loss."""

    id: ClassVar[str] = "plain"

    def delta(self, site: Any, init: Any) -> Plus:
        return Plus(site, init)


def test_resuming_in_another_process_gives_the_same(made: Made) -> None:
    """A new model and Trainer, as another process makes them, go on from step 3."""
    trainer = made("lora(rank=2, dropout=0.1)")
    trainer.train()
    output = Path(trainer.args.output_dir)
    wanted = tensors(output / "checkpoint-6")
    torch.manual_seed(123)
    again = made("lora(rank=2, dropout=0.1)")
    again.train(resume_from_checkpoint=str(output / "checkpoint-3"))
    found = tensors(output / "checkpoint-6")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert again.state.global_step == 6


@pytest.mark.parametrize(
    ("stack", "told"),
    [
        ("lora(rank=4)", r"\n  lora: rank: 2 then, 4 now\n"),
        (
            "lora(rank=2, layers='0')",
            r"\n  lora: layers: None then, [^\n]* now\n  lora: other places, such as model",
        ),
        ("lora(rank=2) + ia3", r"\n  stack: lora then, lora \+ ia3 now\n"),
        ("ia3", r"\n  stack: lora then, ia3 now\n"),
    ],
)
def test_another_stack_is_not_gone_on_with(made: Made, stack: str, told: str) -> None:
    made(max_steps=3).train()
    again = made(stack)
    match = rf"of another stack or base, so training cannot go on from it\n  saw: \n[^\n]*checkpoint-3{told}"
    with refused(InlayError, match, model=again.model):
        again.train(resume_from_checkpoint=True)


def test_another_base_is_not_gone_on_with(made: Made, llama: Llama) -> None:
    made(max_steps=3).train()
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    again = made(model=model)
    with refused(InlayError, r"\n  base: weights: other values than the base it was", model=model):
        again.train(resume_from_checkpoint=True)


def test_resuming_what_is_finished_trains_no_further_step(made: Made) -> None:
    """16 rows are 4 steps, so step 6 lies within an epoch."""
    made().train()
    again = made(load_best_model_at_end=True, metric_for_best_model="loss")
    before = tensors(Path(again.args.output_dir) / "checkpoint-6")
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == 6
    inlay.save(again.model, Path(again.args.output_dir) / "now")
    assert all(torch.equal(t, before[n]) for n, t in tensors(Path(again.args.output_dir) / "now").items())


def test_an_incomplete_checkpoint_is_passed_over(made: Made) -> None:
    trainer = made()
    trainer.train()
    output = Path(trainer.args.output_dir)
    state = output / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    again = made()
    assert again.last_checkpoint() == output / "checkpoint-3"
    with pytest.raises(InlayError, match=r"no complete checkpoint to resume from\n.*checkpoint-6"):
        again.train(resume_from_checkpoint=str(output / "checkpoint-6"))
    with pytest.raises(InlayError, match=r"no complete checkpoint to resume from\n.*empty"):
        made(output="empty").train(resume_from_checkpoint=True)


def test_the_best_step_comes_back_at_the_end(made: Made) -> None:
    """What is asked for here is the highest loss: an early step."""
    trainer = made(
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, max_steps=12
    )
    trainer.train()
    best = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    step = max(best, key=lambda s: best[s])
    assert trainer.state.best_global_step == step != 12
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best[step], rel=1e-6)


def test_only_the_topmost_adapter_can_be_restored(made: Made, llama: Llama) -> None:
    made().train()
    model = llama()
    inlay.attach(model, "lora(rank=2)", "fr")
    trainer = made("ia3", model=model, name="above", adapter="fr")
    with pytest.raises(
        InlayError, match=r"only where its adapter is the topmost\n.*'fr', 'above', and 'fr' is"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_which_adapter_learns_must_be_clear(made: Made, llama: Llama) -> None:
    model = llama()
    inlay.attach(model, "lora(rank=2)", "fr")
    with pytest.raises(InlayError, match=r"not clear which adapter.*\n.*'fr', 'de'\n.*adapter="):
        made("ia3", model=model, name="de")
    inlay.set_trainable(model)
    with pytest.raises(InlayError, match=r"adapters that learn: none"):
        made(None, model=model, output="x")
    inlay.set_trainable(model, "de")
    assert made(None, model=model, output="x").adapter == "de"


def test_the_result_has_tokenizer_card_and_nothing_else_to_push(made: Made) -> None:
    """What `push_to_hub` would upload, up to the network: the folder's files past its own filter."""
    trainer = made("lora(rank=2)", load_best_model_at_end=True, metric_for_best_model="loss")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags="poems")
    output = Path(trainer.args.output_dir)
    files = [str(f.relative_to(output)) for f in output.rglob("*") if f.is_file()]
    pushed = set(filter_repo_objects(files, ignore_patterns=["_*", "checkpoint-*"]))
    adapter = next(f.name for f in output.glob("adapter-*"))
    assert pushed == {"inlay.json", adapter, "README.md", "tokenizer.json", "tokenizer_config.json"}
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "inlay"
    assert card.data.tags == ["inlay", "lora", "poems"]
    assert "| lora | lora | 4 | 1,024 |" in card.text
    best = trainer.state.best_global_step
    assert f"After {best} of 6 steps:" in card.text


def test_save_pretrained_writes_the_base_and_the_adapter(
    made: Made, models: dict[str, Path], tmp_path: Path
) -> None:
    trainer = made()
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "both")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    inlay.load(reloaded, tmp_path / "both")
    batch = {"input_ids": torch.arange(4, 12)[None]}
    trainer.model.eval()
    assert torch.equal(reloaded.eval()(**batch).logits, trainer.model(**batch).logits)


def test_a_model_without_adapters_is_trained_as_a_whole(made: Made, llama: Llama) -> None:
    trainer = made(None, learning_rate=1e-3)
    assert trainer.adapter is None
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-6"
    assert (folder / "model.safetensors").exists()
    start = llama().state_dict()
    assert any(not torch.equal(start[name], t) for name, t in trainer.model.state_dict().items())


def test_texts_of_like_length_share_a_batch_and_resuming_keeps_their_order(made: Made) -> None:
    settings = {"train_sampling_strategy": "group_by_length", "max_steps": 10, "save_steps": 6}
    trainer = made(**settings)
    trainer.train()
    output = Path(trainer.args.output_dir)
    wanted = tensors(output / "checkpoint-10")
    made(**settings).train(resume_from_checkpoint=str(output / "checkpoint-6"))
    assert all(torch.equal(t, wanted[n]) for n, t in tensors(output / "checkpoint-10").items())


def test_mixed_precision_and_gradient_checkpointing_train(made: Made) -> None:
    """Under accelerate's autocast, whose wrapper is still there when the best step comes back."""
    stack = "lora(rank=2) + prefix_tuning(length=2)"
    trainer = made(stack, bf16=True, activation_checkpointing=True, load_best_model_at_end=True,
                   metric_for_best_model="loss")  # fmt: skip
    trainer.train()
    assert "_original_forward" in trainer.model.__dict__
    assert trainer.model.__dict__["forward"].__func__.__qualname__.startswith("convert_outputs_to_fp32")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
