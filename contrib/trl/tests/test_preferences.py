"""Preferences with TRL: DPO against the model's own base, and a reward model whose head learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay import InlayError
from inlay.testing.tools import shake

pytestmark = [
    pytest.mark.xdist_group("trl"),  # imported once
    pytest.mark.filterwarnings("default"),  # theirs are not ours
]
Made = Callable[..., Any]


@pytest.fixture
def dpo(trl: Any, inlay_trl: Any, decoder: Made, tokenizer: Any, settings: Made, pairs: Any) -> Made:
    """Return a function that makes a DPOTrainer of the decoder with a stack, or of a model given."""

    def make(
        stack: Any = "lora(rank=4)", *, model: Any = None, train: tuple[str, ...] = (), output: str = "out",
        lr: float | None = None, reference: tuple[str, ...] = (), ref_model: Any = None, **changes: Any,
    ) -> Any:  # fmt: skip
        if model is None:
            model = decoder()
            inlay.attach(model, stack, "dpo", train=train, seed=0)
        args = trl.DPOConfig(**settings(output, **changes))
        return inlay_trl.DPOTrainer(
            model,
            ref_model,
            args,
            train_dataset=pairs,
            processing_class=tokenizer,
            lr=lr,
            reference=reference,
        )

    return make


def batch_of(trainer: Any) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


def references(trainer: Any, model: Any) -> Tensor:
    """Return TRL's reference log-probabilities of the chosen and rejected texts."""
    with trainer._at_work():
        return torch.stack(trainer.compute_ref_log_probs(model, batch_of(trainer)))


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def storages(*modules: nn.Module) -> dict[int, int]:
    """Return the bytes of every distinct storage that these modules' parameters lie in."""
    found = [p.untyped_storage() for module in modules for p in module.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def bare(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "inlay" not in n.split(".")}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("stack", ["lora(rank=4)", "lora(rank=2) + prefix_tuning(length=3) + ia3()"])
def test_the_reference_is_the_bare_base_bit_for_bit(dpo: Made, decoder: Made, stack: str) -> None:
    """The same as with a second model, which TRL would keep otherwise."""
    trainer = dpo(stack)
    shake(trainer.model)
    found = references(trainer, trainer.ref_model)
    with_base = dpo(None, model=decoder(), ref_model=decoder())
    assert torch.equal(found, references(with_base, with_base.ref_model))
    assert not torch.equal(found, references(trainer, trainer.model))


def test_there_is_one_copy_of_the_base(dpo: Made, decoder: Made) -> None:
    trainer = dpo()
    trainer.train()
    base = sum(storages(decoder()).values())
    adapters = {p.data_ptr() for n, p in trainer.model.named_parameters() if "inlay" in n.split(".")}
    held = storages(trainer.model, trainer.ref_model)
    assert sum(size for start, size in held.items() if start not in adapters) == base
    assert list(trainer.ref_model.parameters()) == []


@pytest.mark.parametrize("train", [pytest.param((), marks=pytest.mark.slow), ("head",)])
def test_it_learns_what_is_preferred_and_leaves_the_base_alone(dpo: Made, train: tuple[str, ...]) -> None:
    trainer = dpo(train=train, max_steps=12, lr=0.02)
    before = bare(trainer.model)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(0.6931, abs=2e-3)  # log 2: policy and reference are one yet
    assert sum(logged(trainer)[-4:]) / 4 < 0.6
    assert logged(trainer, "rewards/margins")[-1] > 0.1
    assert same(bare(trainer.model), before)
    folder = Path(trainer.args.output_dir) / "checkpoint-12"
    assert (folder / "inlay.json").exists()
    assert not (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_resuming_gives_the_same(dpo: Made) -> None:
    def tensors() -> dict[str, Tensor]:
        return load_file(next((Path(trainer.args.output_dir) / "checkpoint-4").glob("adapter-*")))

    trainer = dpo()
    trainer.train()
    wanted = tensors()
    torch.manual_seed(5)
    dpo().train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    assert wanted
    assert same(tensors(), wanted)


@pytest.mark.slow
def test_an_adapter_may_stay_on_in_the_reference(dpo: Made, decoder: Made) -> None:
    """The usual order: supervised first, then preferences on top of it."""
    model = decoder()
    inlay.attach(model, "lora(rank=4)", "sft", trainable=False)
    shake(model)
    inlay.attach(model, "ia3()", "dpo")
    trainer = dpo(model=model, reference=("sft",))
    found = references(trainer, trainer.ref_model)
    inlay.detach(model, "dpo")
    assert torch.equal(found, references(trainer, model))
    with_base = dpo(None, model=decoder(), ref_model=decoder())
    assert not torch.equal(found, references(with_base, with_base.ref_model))


@pytest.mark.slow
def test_what_is_computed_before_training_is_the_references(dpo: Made, tmp_path: Path) -> None:
    trainer = dpo(precompute_ref_log_probs=True)
    now = dpo()
    columns = trainer.train_dataset[:4]
    stored = torch.tensor([columns["ref_chosen_logps"], columns["ref_rejected_logps"]])
    torch.testing.assert_close(stored, references(now, now.ref_model), rtol=0, atol=1e-5)
    shake(trainer.model)
    trainer.train()
    assert len(logged(trainer)) == 4


def test_a_reference_that_follows_is_refused(dpo: Made) -> None:
    with pytest.raises(
        InlayError, match=r"cannot follow the training(.|\n)*saw: sync_ref_model=True"
    ) as caught:
        dpo(sync_ref_model=True)
    assert "pass ref_model=" in str(caught.value)


def test_a_reward_model_learns_with_its_head(
    trl: Any, inlay_trl: Any, decoder: Made, tokenizer: Any, settings: Made, pairs: Any
) -> None:
    def made() -> Any:
        model = decoder("LlamaForSequenceClassification", num_labels=1)
        inlay.attach(model, "lora(rank=4)", "reward", train=("head",), seed=0)
        args = trl.RewardConfig(**settings(max_steps=12, save_steps=6))
        return inlay_trl.RewardTrainer(model, args, train_dataset=pairs, processing_class=tokenizer, lr=0.02)

    trainer = made()
    before = bare(trainer.model)
    head = next(p for n, p in trainer.model.named_parameters() if n.startswith("score.inlay"))
    start = head.detach().clone()
    trainer.train()
    assert sum(logged(trainer)[-4:]) < sum(logged(trainer)[:4]) - 0.2
    assert not torch.equal(head, start)
    assert same(bare(trainer.model), before)
    folder = Path(trainer.args.output_dir) / "checkpoint-12"
    assert not (folder / "model.safetensors").exists()
    torch.manual_seed(9)  # a head of other values, as in another process
    fresh = decoder("LlamaForSequenceClassification", num_labels=1, pad_token_id=0)
    nn.init.normal_(fresh.score.weight)
    inlay.load(fresh, folder)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(fresh.eval()(ids).logits, trainer.model.eval()(ids).logits)
    wanted = load_file(next(folder.glob("adapter-*")))
    again = made()
    again.train(resume_from_checkpoint=str(folder.parent / "checkpoint-6"))
    assert wanted
    assert same(load_file(next(folder.glob("adapter-*"))), wanted)
