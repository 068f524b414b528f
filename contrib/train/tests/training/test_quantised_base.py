"""A base in 4 or 8 bits under an attached stack: accepted, trained through evaluations, resumed, used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import inlay
from inlay.testing.models import batch_for
from inlay.testing.quantised import PACKED_SIZES
from inlay.testing.tools import distance, lively, shake
from inlay_train import base, loading
from inlay_train.cli import app
from inlay_train.quantised import FewBits
from inlay_train.trainer import Trainer

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt.*:UserWarning",
    "ignore:.*bitsandbytes..gemv_4bit. an autograd kernel was not registered.*:UserWarning",
)


FOUR = FewBits(4, double=True, compute="float32")


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


@pytest.mark.parametrize("how", ["dequantise", "requantise"])
def test_a_checkpoint_is_merged_into_the_folder_of_a_quantised_base(how: str, tmp_path: Path) -> None:
    base.quiet()
    lively("llama", **PACKED_SIZES).save_pretrained(tmp_path / "full")  # type: ignore[operator]
    kind, bits = transformers.LlamaForCausalLM, transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = kind.from_pretrained(tmp_path / "full", quantization_config=bits)
    model.save_pretrained(tmp_path / "base")
    inlay.attach(model, "lora(rank=4)", seed=0)
    shake(model)
    inlay.save(model, tmp_path / "adapter")
    batch = batch_for(model)
    with torch.no_grad():
        adapted = model(**batch).logits
    command = ["merge", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--output"]
    refused = CliRunner().invoke(app, [*command, str(tmp_path / "no")])
    assert refused.exit_code == 1
    assert 'merge(..., quantised="dequantise")' in refused.output
    done = CliRunner().invoke(app, [*command, str(tmp_path / "out"), "--quantised", how])
    assert done.exit_code == 0, done.output
    assert ("storing in few bits cost up to" in done.output) == (how == "requantise")
    again = kind.from_pretrained(tmp_path / "out")
    layers = again.model.layers[0].self_attn
    assert (type(layers.q_proj) is torch.nn.Linear) == (how == "dequantise")
    assert type(layers.k_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        assert distance(again(**batch).logits, adapted) < (1e-5 if how == "dequantise" else 0.5)


def test_what_transformers_refuses_is_accepted_where_the_trainer_is_built(
    models: dict[str, Path], made: Callable[..., Trainer], tmp_path: Path
) -> None:
    base.quiet()
    model: Any = loading.model(
        models["llama"], transformers.LlamaForCausalLM, seed=0, settings={}, few_bits=FOUR
    )
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
