"""A base in 4 or 8 bits under an attached stack: accepted, trained through evaluations, resumed, used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

import inlay
from inlay_train import base, loading
from inlay_train.cli import app
from inlay_train.trainer import Trainer

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt.*:UserWarning",
    "ignore:.*bitsandbytes..gemv_4bit. an autograd kernel was not registered.*:UserWarning",
)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_stack_learns_on_a_quantised_base(
    models: dict[str, Path], table: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    data, output = table(), tmp_path / "out"
    options = ["--model", models["bert"], "--data", data, "--task", "classification", "--output", output,
               "--method", "lora(rank=4) + ia3", "--bits", bits, "--lr", 0.01, "--epochs", 4,
               "--batch", 8]  # fmt: skip
    done = CliRunner().invoke(app, ["train", *map(str, options)])
    assert done.exit_code == 0, done.output
    result = json.loads((output / "result.json").read_text())
    assert len(result["evaluations"]) == 4
    assert result["losses"][-1][1] < result["losses"][0][1]
    used = CliRunner().invoke(app, ["predict", str(output), "--data", str(data), "--json"])
    assert used.exit_code == 0, used.output
    assert {json.loads(line)["label"] for line in used.output.splitlines()} <= {"good", "bad"}


def test_what_transformers_refuses_is_accepted_where_the_trainer_is_built(
    models: dict[str, Path], made: Callable[..., Trainer], tmp_path: Path
) -> None:
    base.quiet()
    model: Any = loading.model(models["llama"], transformers.LlamaForCausalLM, seed=0, settings={}, bits=4)
    args = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, args)
    inlay.attach(model, "lora(rank=2)", "fr")
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, args)
    inlay.detach(model)
    trainer = made("lora(rank=2)", model=model, max_steps=4, eval_steps=2)
    assert "_hf_peft_config_loaded" not in model.__dict__
    trainer.train()
    assert trainer.state.global_step == 4
    assert len([logs for logs in trainer.state.log_history if "eval_loss" in logs]) == 2
