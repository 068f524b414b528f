"""`inlay estimate`: the step counted on shapes against the same step with values; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, LlamaConfig, MixtralConfig, T5Config
from typer.testing import CliRunner

from inlay import InlayError
from inlay_train.cli import app
from inlay_train.estimate import request as requests
from inlay_train.estimate.ledger import Ledger
from inlay_train.estimate.report import size
from inlay_train.estimate.request import Request, bytes_of, quantisation
from inlay_train.estimate.result import Estimate, estimate, largest

MEASURING = Path(__file__).resolve().parents[4] / "benchmarks" / "measuring.py"
LLAMA: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA, num_key_value_heads=2, architectures=["LlamaForCausalLM"]),
    "mixtral": MixtralConfig(
        **LLAMA, num_key_value_heads=2, num_local_experts=3, architectures=["MixtralForCausalLM"]
    ),
    "bert": BertConfig(**LLAMA, architectures=["BertForSequenceClassification"]),
    "headless": BertConfig(**LLAMA, architectures=["BertModel"]),
    "t5": T5Config(
        vocab_size=500, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
    ),
    "bare": LlamaConfig(**LLAMA),
    "wide": LlamaConfig(
        **{**LLAMA, "vocab_size": 2000, "hidden_size": 512, "intermediate_size": 1024},
        architectures=["LlamaForCausalLM"],
    ),
}  # fmt: skip
STACK = "lora(rank=8) + prefix_tuning(length=8, hidden=16) + serial_adapter(rank=8)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of models without weights, one per configuration."""
    for name, config in CONFIGS.items():
        config.save_pretrained(tmp_path / name)
    return tmp_path


def counted(folder: Path, model: str, method: str = "lora(rank=4)", **settings: Any) -> Estimate:
    return estimate(asked(folder, model, method, **settings))


def asked(folder: Path, model: str, method: str, **settings: Any) -> Request:
    return Request(str(folder / model), method, **{"batch": 4, "length": 32, **settings})


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["estimate", *map(str, arguments)])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.output


# -- against real steps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "method", "settings"),
    [
        pytest.param("llama", STACK, {"checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("llama", "lora(rank=4)", {"quantize": "nf4", "padded": True}, marks=pytest.mark.slow),
        ("bert", "lora(rank=4)", {"dtype": "bfloat16"}),
        pytest.param("t5", "full", {"optimizer": "sgd", "target_length": 8}, marks=pytest.mark.slow),
    ],
)
def test_it_is_what_a_real_step_takes(
    folder: Path, model: str, method: str, settings: dict[str, Any]
) -> None:
    if "quantize" in settings:
        pytest.importorskip("bitsandbytes")
    wanted = asked(folder, model, method, **settings)
    done = subprocess.run(
        [sys.executable, str(MEASURING), json.dumps(asdict(wanted))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout.splitlines()[-1])["peak"]
    assert estimate(wanted).total == pytest.approx(peak, rel=0.1)


# -- what is counted ---------------------------------------------------------------------------------


def test_a_storage_counts_once_and_while_it_lives() -> None:
    with Ledger() as ledger, ledger.during("base"):
        whole = torch.zeros(100)
        part = whole[:50].view(5, 10)
        assert ledger.live["base"] == 400
        del whole
        assert ledger.live["base"] == 400
        ledger.book([part], "adapters")
        assert (ledger.live["base"], ledger.live["adapters"]) == (0, 400)
        del part
        assert ledger.live["adapters"] == 0
        assert (ledger.peak, ledger.at_peak["adapters"]) == (400, 0)


def test_the_peak_is_of_one_device() -> None:
    with Ledger(block=512) as ledger:
        ledger.shares["base"] = 0.5
        with ledger.during("base"):
            kept = torch.zeros(129)  # 516 bytes: two blocks
        assert (ledger.live["base"], ledger.peak) == (1024, 512)
        ledger.add("buckets", 100)
        ledger.mark()
        assert ledger.peak == 612
        del kept


def test_weights_gradients_and_states_are_those_of_the_parameters(folder: Path) -> None:
    found = counted(folder, "llama", "lora(rank=4) + serial_adapter(rank=8)")
    lines = {line.kind: line for line in found.lines}
    own = sum(count for _, count in found.parts)
    assert [name for name, _ in found.parts] == ["lora", "serial_adapter"]
    assert found.learning == own
    assert lines["adapters"].at_peak == lines["gradients"].most == 4 * own
    assert 8 * own <= lines["optimizer"].most <= 8 * own + 4 * 100  # and a count of steps for each tensor
    assert 4 * found.parameters <= lines["base"].at_peak <= 4 * found.parameters + 1000  # and rotary angles
    assert found.total == sum(line.at_peak for line in found.lines)


def test_settings_cost_what_they_should(folder: Path) -> None:
    plain = counted(folder, "llama")
    kept = {name: counted(folder, "llama", **settings) for name, settings in {
        "checkpointing": {"checkpointing": True}, "half": {"dtype": "bf16"}, "sgd": {"optimizer": "sgd"},
        "padded": {"padded": True}, "double": {"batch": 8},
    }.items()}  # fmt: skip
    assert kept["checkpointing"].kept < plain.kept
    assert kept["half"].lines[0].at_peak == pytest.approx(plain.lines[0].at_peak / 2, rel=0.01)
    assert next(line.most for line in kept["sgd"].lines if line.kind == "optimizer") == 0
    assert kept["padded"].total > plain.total
    assert kept["double"].kept == pytest.approx(2 * plain.kept, rel=0.01)


def test_the_attention_of_a_gpu_keeps_no_matrix_of_weights(folder: Path) -> None:
    on = {device: counted(folder, "bert", length=64, device=device).kept for device in ("cpu", "cuda")}
    layers, heads = 2, 4
    assert on["cpu"] - on["cuda"] > layers * heads * 4 * 64 * 64 * 4  # dropout is on: the CPU keeps them


def test_few_bits_are_the_librarys(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = {
        how: counted(folder, "wide", quantize=how).lines[0].at_peak for how in (None, *requests.QUANTISED)
    }
    linear = 2 * (4 * 512 * 512 + 3 * 512 * 1024)  # entries of the layers that are quantised
    saved = {how: 8 * (base[None] - bytes_) / linear for how, bytes_ in base.items()}
    assert saved["nf4"] == pytest.approx(32 - 4.5, abs=0.02)
    assert saved["fp4"] == pytest.approx(32 - 4.5, abs=0.02)
    assert saved["nf4-double"] == pytest.approx(32 - 4.127, abs=0.05)  # besides: a table for each layer
    assert saved["int8"] == pytest.approx(32 - 8 - 32 / 512, abs=0.05)  # a float32 for each row


def test_a_paged_state_lies_outside_a_gpu(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    found = counted(folder, "wide", "full", length=8, optimizer="paged_adamw", device="cuda")
    norms = 5 * 512  # too small to be paged
    assert found.paged == 2 * 4 * (found.parameters - norms)
    assert next(line.most for line in found.lines if line.kind == "optimizer") == pytest.approx(
        2 * 4 * norms, abs=4 * 512
    )
    assert found.total < counted(folder, "wide", "full", length=8, optimizer="paged_adamw").total


def test_processes_shard_or_copy(folder: Path) -> None:
    alone, sharded, copied = (
        counted(folder, "llama", **more) for more in ({}, {"processes": 4, "fsdp": True}, {"processes": 4})
    )
    lines = {line.kind: line.at_peak for line in sharded.lines}
    assert lines["base"] == pytest.approx(alone.lines[0].at_peak / 4, abs=1)
    assert lines["gathered"] > 0
    assert copied.total - alone.total == pytest.approx(4 * copied.learning)


# -- the largest batch -------------------------------------------------------------------------------


def test_the_largest_batch_fits_and_one_more_does_not(folder: Path) -> None:
    found = estimate(asked(folder, "llama", "lora(rank=4)"), memory=20 * 2**20)
    assert found.fits
    best = found.largest_batch or 0
    assert counted(folder, "llama", batch=best).total <= 20 * 2**20
    assert counted(folder, "llama", batch=best + 1).total > 20 * 2**20


@pytest.mark.parametrize("memory", [999, 1_000, 1_099, 1_100, 10**5, 123_456])
def test_the_search_finds_it_however_the_total_bends(memory: int) -> None:
    def total(batch: int) -> int:
        return max(900 + 100 * batch, 500 + 150 * batch)

    best = largest(total, memory, {8: total(8)})
    assert best == 0 if total(1) > memory else total(best) <= memory < total(best + 1)


# -- the command -------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(folder: Path) -> None:
    arguments = ["--model", folder / "llama", "--method", "lora(rank=4)", "--max-length", 32, "--batch", 2]
    text = run(*arguments, "--memory", "5MiB", "--gradient-checkpointing")
    plain = json.loads(run(*arguments, "--checkpointing", "--json"))
    assert f"total                            {size(plain['total'])}" in text
    assert "fits in 5.00 MiB; the largest batch that fits is" in text
    assert "left out:" in text
    assert plain["parameters"]["lora"] == plain["learning"]
    assert plain["total"] == sum(plain["at_peak"].values())
    assert "does not fit in 1.00 KiB: not even a batch of 1" in run(*arguments, "--memory", "1KiB")


def test_a_configuration_file_is_enough(folder: Path) -> None:
    plain = json.loads(
        run("--model", folder / "bare" / "config.json", "--method", "head", "--length", 8, "--json")
    )
    assert (plain["architecture"], plain["task"]) == ("LlamaForCausalLM", "causal-lm")


def test_amounts_of_memory() -> None:
    assert (bytes_of("24GiB"), bytes_of("1.5 kb"), bytes_of("80G")) == (24 * 2**30, 1500, 80 * 2**30)
    assert [size(n) for n in (12, 2048, 3 * 2**40, 5 * 2**50)] == [
        "12 B",
        "2.00 KiB",
        "3.00 TiB",
        "5120.00 TiB",
    ]
    for wrong in ("", "much", "0GiB", "24 parsecs"):
        with pytest.raises(InlayError, match="no amount of memory"):
            bytes_of(wrong)


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"processes": 0}, r"--processes counts from 1\n  saw: --processes 0"),
        ({"batch": 0}, r"--batch counts from 1"),
        ({"length": 1000}, r"--length 1,000, and max_position_embeddings is 128\n  do:  give --length 128"),
        ({"model": "t5", "target_length": 0}, r"--target-length counts from 1"),
        ({"model": "llama", "target_length": 500}, r"--target-length 500, and max"),
        ({"optimizer": "adamv"}, r"--optimizer 'adamv'\n  do:  did you mean 'adamw'"),
        ({"dtype": "fp8"}, r"--dtype 'fp8'"),
        ({"device": "gpu"}, r"--device 'gpu'"),
        ({"quantize": "nf5"}, r"--quantize 'nf5'\n  do:  did you mean 'nf4'"),
        ({"quantize": "nf4", "method": "full"}, r"--quantize nf4 --method full"),
        ({"fsdp": True}, r"nothing to shard with"),
        ({"model": "headless"}, r"has no loss to train by\n  saw: .*BertModel\n  do:  pass --task"),
        ({"method": "lora(targets=['v_porj'])"}, r"v_porj"),
        ({"method": "lorra()"}, r"lorra"),
        ({"task": "causal"}, r"there is no task 'causal'"),
        ({"model": "nowhere"}, r"there is no such model here"),
        (
            {"model": "mixtral"},
            r"a step of this model depends on values.*\n  saw: (.*)\n  do:  measure a run",
        ),
        ({"method": "fishmask()"}, r"attaching the stack depends on values"),
    ],
)
def test_what_cannot_be_estimated(folder: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InlayError, match=said):
        counted(folder, **{"model": "llama", **settings})


def test_a_base_given_in_two_ways() -> None:
    assert (quantisation(None, 4), quantisation(None, 8)) == ("nf4-double", "int8")
    assert quantisation("fp4", None) == "fp4"
    with pytest.raises(InlayError, match="--quantize nf4 --bits 4"):
        quantisation("nf4", 4)
    with pytest.raises(InlayError, match="--bits 5"):
        quantisation(None, 5)


def test_what_needs_bitsandbytes_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "find_spec", lambda name: None)
    for settings in ({"quantize": "nf4"}, {"optimizer": "paged_adamw"}):
        with pytest.raises(InlayError, match="pip install bitsandbytes"):
            counted(folder, "llama", **settings)


def test_a_model_that_cannot_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(InlayError, match="computes no activations twice"):
        counted(folder, "llama", checkpointing=True)


def test_nothing_is_left_behind(folder: Path) -> None:
    """Fake tensors must not reach what the process shares, or a real model made later would hold some."""
    counted(folder, "llama", STACK, quantize="nf4-double", optimizer="adamw_8bit")
    import bitsandbytes

    assert type(bitsandbytes.functional.name2qmap["dynamic"]) is torch.Tensor
    assert not bitsandbytes.optim.GlobalOptimManager.get_instance().pid2config
    assert type(nn.Linear(2, 2).weight) is nn.Parameter
