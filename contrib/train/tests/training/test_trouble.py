"""Training that goes wrong: numbers that are not finite, files that cannot be written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from inlay import InlayError
from inlay.errors import TrainingError
from inlay_train.trainer import Trainer

Made = Callable[..., Trainer]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("adapter-*.safetensors")))


def test_a_loss_that_is_not_finite_names_the_first_bad_part(made: Made) -> None:
    trainer = made("lora(rank=2) + ia3()", lr=1e30, max_steps=8, save_steps=1, max_grad_norm=0.0)
    with pytest.raises(TrainingError) as found:
        trainer.train()
    text = str(found.value)
    assert "training diverged: " in text
    assert re.search(
        r"saw: every trained value is finite, the largest 1e\+30 in the part fr/\w+ \(model\.", text
    )
    assert "; the first output that is not is that of model.layers.0." in text
    assert "lower the learning rate (now " in text
    good = trainer.last_checkpoint()
    assert (f"the last good checkpoint is {good}" if good else "there is no checkpoint yet") in text
    for checkpoint in Path(trainer.args.output_dir).glob("checkpoint-*"):
        assert all(t.isfinite().all() for t in tensors(checkpoint).values()), checkpoint


def test_values_that_are_not_finite_are_never_saved(made: Made) -> None:
    """What went wrong in an update shows when that step is to be saved."""

    class Spoil(transformers.TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                with torch.no_grad():
                    kwargs["optimizer"].param_groups[0]["params"][1][0, 0] = math.nan

    trainer = made("lora(rank=2) + ia3()", callbacks=[Spoil()])
    message = (r"trained values are not finite after step 6\n.*the part fr/lora: 1 of its tensors, the first "
               r"model\.layers\.0\.self_attn\.q_proj\.inlay\.0\.0\.up, have .*\n.*checkpoint-3")  # fmt: skip
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert not (Path(trainer.args.output_dir) / "checkpoint-6").exists()


def test_a_gradient_that_is_not_finite_ends_training_before_it_is_used(made: Made) -> None:
    class Spoil(transformers.TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["optimizer"].param_groups[0]["params"][0].grad.fill_(math.inf)

    trainer = made(callbacks=[Spoil()], gradient_accumulation_steps=2)
    message = (
        r"the gradient's norm is (inf|nan) in step 1\n.*fr/lora: 1 of its tensors.*a gradient that is not"
    )
    with pytest.raises(TrainingError, match=message):
        trainer.train()


def test_a_base_that_gives_no_number_is_found_out(made: Made) -> None:
    trainer = made()
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.down_proj.weight[0, 0] = math.inf
    message = (
        r"the loss is nan in step 1\n.*every trained value is finite.* that of model\.layers\.1\.mlp\.down"
    )
    with pytest.raises(TrainingError, match=message):
        trainer.train()


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(made: Made) -> None:
    """A file of the second checkpoint leads to a device that is always full."""
    trainer = made()
    folder = Path(trainer.args.output_dir) / "checkpoint-6"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").symlink_to("/dev/full")
    with pytest.raises(InlayError) as found:
        trainer.train()
    text = str(found.value)
    assert "the run's files cannot be written; is the disk full?" in text
    assert f"saw: {folder}: " in text
    assert "MiB are free there" in text
    assert f"make room, then resume: {folder.parent / 'checkpoint-3'} is whole" in text
    assert not folder.exists()
    made().train(resume_from_checkpoint=True)
    assert folder.is_dir()


def test_an_adapter_that_cannot_be_written_is_told_the_same(made: Made) -> None:
    trainer = made()
    folder = Path(trainer.args.output_dir) / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "rng_state.pth").symlink_to("/dev/full")
    with pytest.raises(
        InlayError, match=r"is the disk full\?\n.*checkpoint-3: .*\n.*there is no checkpoint yet"
    ):
        trainer.train()
