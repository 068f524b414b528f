"""Dtypes of a run: of the base, of what learns, of the products; masters; a scaled loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay import InlayError
from inlay.masters import Masters
from inlay_train import run
from inlay_train.config import make
from inlay_train.precision import check_precision
from inlay_train.trainer import Trainer

Made = Callable[..., Trainer]
RUN = {"task": "causal-lm", "method": "lora(rank=2)", "steps": 4, "evaluate_every": 2, "batch": 4}


def config(folder: Path, **settings: Any) -> Any:
    given = {"model": str(folder / "m"), "data": folder / "d.csv", "output": folder / "out", **RUN}
    return make(**{**given, **settings})


@pytest.fixture
def given(models: dict[str, Path], table: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    return {"model": str(models["llama"]), "data": table(), "output": tmp_path / "out"}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"dtype": "bfloat16", "adapter_dtype": "float32"}, "F32"),
        ({"dtype": "bfloat16", "master_weights": True}, "BF16"),
        ({"dtype": "float16", "adapter_dtype": "float32"}, "F32"),
        ({"mixed_precision": "bf16"}, "F32"),
    ],
    ids=["adapter", "masters", "float16", "autocast"],
)
def test_a_run_in_other_dtypes_learns_and_keeps_them(
    given: dict[str, Any], settings: dict[str, Any], kept: str, tmp_path: Path
) -> None:
    from safetensors import safe_open

    result = run.train(config(tmp_path, **given, **settings))
    assert result.steps == 4
    assert all(math.isfinite(loss) for _, loss in result.losses)
    assert result.losses[-1][1] < result.losses[0][1]
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-4"):
        with safe_open(next(folder.glob("adapter-*.safetensors")), "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {kept}  # noqa: SIM118 - no dict


def test_a_run_with_masters_resumes_bit_for_bit(made: Made, llama: Callable[[], Any]) -> None:
    whole = made(model=llama().to(torch.bfloat16), masters=True, output="whole")
    whole.train()
    assert isinstance(whole.optimizer.optimizer, Masters)
    resumed = made(model=llama().to(torch.bfloat16), masters=True, output="resumed")
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for a, b in zip(learnt(whole), learnt(resumed), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


def learnt(trainer: Trainer) -> list[Tensor]:
    assert isinstance(trainer.model, nn.Module)
    return [p for p in trainer.model.parameters() if p.requires_grad]


def test_a_step_that_the_scaler_skips_does_not_end_training(made: Made) -> None:
    """The scale starts so high that the first gradients overflow; accelerate makes it on GPUs alone."""
    trainer = made(max_grad_norm=0.0, eval_strategy="no", save_strategy="no")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert not math.isfinite(norms[0])
    assert trainer.state.global_step == 6
    assert trainer.accelerator.scaler.get_scale() < 2.0**127
    assert all(p.isfinite().all() for p in learnt(trainer))
    assert inlay.summary(trainer.model).parts[0].dtype == "float32"


def test_a_gradient_that_is_not_finite_ends_training_where_nothing_skips_it(made: Made) -> None:
    trainer = made(max_grad_norm=0.0, eval_strategy="no", save_strategy="no")
    learnt(trainer)[0].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(InlayError, match=r"the gradient's norm is (nan|inf) in step 1"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"method": "full", "master_weights": True},
            r"no adapters to keep[\s\S]*--method full, adapter dtype None",
        ),
        (
            {"dtype": "float16", "mixed_precision": "bf16"},
            r"no bfloat16 into a float16 model[\s\S]*--dtype float16",
        ),
        (
            {"mixed_precision": "fp16"},
            r"scaled on an accelerator only[\s\S]*mixed-precision fp16, and none here",
        ),
    ],
    ids=["full", "mixed", "no accelerator"],
)
def test_dtypes_that_do_not_go_together_are_refused(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    if torch.accelerator.is_available() and "mixed_precision" in settings and "dtype" not in settings:
        pytest.skip("an accelerator is here")
    with pytest.raises(InlayError, match=said):
        check_precision(config(tmp_path, **settings))


def test_a_scaled_loss_needs_gradients_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    settings = {"dtype": "float16", "mixed_precision": "fp16"}
    with pytest.raises(
        InlayError, match=r"needs gradients in float32[\s\S]*parameters that learn in float16"
    ):
        check_precision(config(tmp_path, **settings))
    check_precision(config(tmp_path, **settings, master_weights=True))
    check_precision(config(tmp_path, **settings, adapter_dtype="float32"))
