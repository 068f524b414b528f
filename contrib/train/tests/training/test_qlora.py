"""QLoRA: a 4-bit base prepared in one call that says what it did; any stack on it; optimizers in 8 bits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import inlay
from inlay import InlayError
from inlay.testing.models import batch_for, build
from inlay.testing.quantised import PACKED_SIZES, packed, packed_tensors
from inlay.testing.refusal import refused
from inlay.testing.tools import distance
from inlay_train import loading
from inlay_train.cli import app
from inlay_train.config import make
from inlay_train.prepare import check_optimizer
from inlay_train.quantised import FewBits, prepare_quantised
from inlay_train.trainer import Trainer

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*bitsandbytes..gemv_4bit. an autograd kernel was not registered.*:UserWarning"
)
STACK = "lora(rank=4) + serial_adapter(rank=8) + p_tuning_v2(length=4)"
GIVEN = {"model": "m", "data": "d.csv", "task": "classification", "method": "lora", "output": "o"}


def four_bits(family: str = "llama", kind: str = "nested nf4") -> Any:
    return packed(family, kind, **PACKED_SIZES)


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "Linear4bit"]


def test_one_call_prepares_a_base_and_says_what_it_did() -> None:
    model = four_bits()
    before = packed_tensors(model)
    report = prepare_quantised(model)
    assert str(report).splitlines() == [
        "14 layers in 4 bits (nf4, its scales in 8 bits) computing in float32: 0.0 MB, in 16 bits 0.1 MB",
        "norms: left as they are (5 in float32)",
        "head: lm_head left in float32",
        "gradient checkpointing: on, without reentry, so inputs need no gradients",
        "cache of keys and values: off, which checkpointing rules out in training",
    ]
    # Half a byte an entry, a byte of scale for 64 of them, four for 256 such; in 8 bits more than in none.
    entries = report.in_16_bits // 2
    assert entries * (0.5 + 1 / 64) <= report.stored <= entries * (0.5 + 1 / 64 + 4 / 64)
    assert prepare_quantised(four_bits(kind="nf4")).stored == entries * (0.5 + 4 / 64)
    assert model.is_gradient_checkpointing
    assert model.config.use_cache is False
    assert all(torch.equal(t, before[n]) for n, t in packed_tensors(model).items())


def test_biases_take_the_dtype_that_their_layers_compute_in() -> None:
    """The layer would do it in its first call; what is said beforehand is then all that happens."""
    model = four_bits("bert")
    for layer in layers(model):
        layer.compute_dtype = torch.bfloat16
    report = prepare_quantised(model, checkpointing=False)
    assert f"biases: {len(layers(model))} cast to what their layers compute in" in str(report)
    assert "checkpointing" not in str(report)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    inlay.attach(model, "lora(rank=2)")
    model.train()(**batch_for(model, labels=True)).loss.backward()
    inlay.check_training(model)
    inlay.detach(model)
    assert all(
        torch.equal(p, kept[name]) and p.dtype == kept[name].dtype for name, p in model.named_parameters()
    )


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda: build("llama"), r"no layer of this model is quantised\n  saw: a LlamaForCausalLM of \d+"),
        (
            lambda: attached(four_bits()),
            r"to be prepared before anything is attached to it\n  saw: fr/lora and 0",
        ),
        (lambda: Plain(), r"this model has no gradient checkpointing\n  saw: Plain\.supports"),
    ],
    ids=["not quantised", "attached", "no checkpointing"],
)
def test_what_cannot_be_prepared_is_refused(spoil: Callable[[], nn.Module], match: str) -> None:
    model = spoil()
    with refused(InlayError, match, model=model):
        prepare_quantised(model)


def attached(model: nn.Module) -> nn.Module:
    inlay.attach(model, "lora(rank=2)", "fr")
    return model


def test_weights_packed_for_inference_are_refused() -> None:
    """Marked as bitsandbytes marks them in a call in eval mode, where a processor has its kernel."""
    model = four_bits()
    for layer in layers(model):
        layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InlayError, match=r"packed quantised weights for inference[\s\S]*q_proj and 13 more"):
        prepare_quantised(model)
    assert not model.is_gradient_checkpointing


class Plain(nn.Module):
    """A model that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = four_bits().model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = four_bits()
        prepare_quantised(model, checkpointing=checkpointing)
        if reentrant and checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        inlay.attach(model, STACK, seed=0)
        torch.manual_seed(0)  # P-tuning v2 has dropout
        model.train()(**batch_for(model, labels=True)).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("how", ["dequantise", "requantise"])
def test_a_stack_is_trained_saved_loaded_and_merged(how: str, tmp_path: Path) -> None:
    model, fresh = four_bits(), four_bits()
    before = packed_tensors(model)
    prepare_quantised(model)
    inlay.attach(model, STACK, seed=0)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-2))
    batch, losses = batch_for(model, labels=True), []
    torch.manual_seed(0)
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.train()(**batch).loss
        loss.backward()
        inlay.check_training(model, optimizer, loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(t, before[n]) for n, t in packed_tensors(model).items())
    inlay.save(model, tmp_path)
    inlay.load(fresh, tmp_path)
    adapted = logits(model)
    assert torch.equal(logits(fresh), adapted)
    report = inlay.merge(fresh, parts=["default/lora"], quantised=how)
    kind = type(fresh.model.layers[0].self_attn.q_proj).__name__
    assert kind == ("Linear" if how == "dequantise" else "Linear4bit")
    assert distance(logits(fresh), adapted) < (1e-5 if how == "dequantise" else 0.5), report


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(**batch_for(model)).logits
    return found


def test_the_command_trains_over_four_bits_and_says_how(
    models: dict[str, Path], table: Callable[..., Path], tmp_path: Path
) -> None:
    """The recipe as a file: bfloat16 beside and inside the layers, checkpointing, an optimizer in 8 bits."""
    file, data = tmp_path / "run.yaml", table()
    file.write_text(f"model: {models['bert']}\ndata: {data}\ntask: classification\noutput: out\n"
                    f"method: {STACK}\nbits: 4\ndtype: bfloat16\noptimizer: adamw_8bit\n"
                    "gradient-checkpointing: true\nlr: 0.01\nepochs: 4\nbatch: 8\n")  # fmt: skip
    done = CliRunner().invoke(app, ["train", str(file)])
    assert done.exit_code == 0, done.output
    assert "13 layers in 4 bits (nf4, its scales in 8 bits) computing in bfloat16: " in done.output
    assert "gradient checkpointing: on" in done.output
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["losses"][-1][1] < result["losses"][0][1]
    facts = json.loads((tmp_path / "out" / "task.json").read_text())
    assert facts["few_bits"] == {"bits": 4, "double": True, "compute": "bfloat16"}
    used = CliRunner().invoke(app, ["predict", str(tmp_path / "out"), "--data", str(data), "--json"])
    assert used.exit_code == 0, used.output
    right = [json.loads(line)["label"] for line in used.output.splitlines()]
    assert len(right) == 60


@pytest.mark.parametrize("double", [True, False])
def test_statistics_are_quantised_too_unless_told_otherwise(models: dict[str, Path], double: bool) -> None:
    config = make(**{**GIVEN, "bits": 4, **({} if double else {"double_quant": False})})
    assert config.few_bits == FewBits(4, double, "float32")
    kind = transformers.LlamaForCausalLM
    model = loading.model(models["llama"], kind, seed=0, settings={}, few_bits=config.few_bits)
    assert {layer.weight.quant_state.nested for layer in layers(model)} == {double}


def test_an_optimizer_in_eight_bits_is_resumed_to_the_bit(made: Callable[..., Trainer]) -> None:
    """bitsandbytes keeps tensors of 4,096 entries and more so, on the CPU too."""
    settings = {"optim": "adamw_8bit", "eval_strategy": "no", "max_steps": 4, "save_steps": 2}
    stack = "lora(rank=64, targets=['linear'])"
    trainer = made(stack, **settings)
    trainer.train()
    states = trainer.optimizer.optimizer.state.values()
    assert torch.uint8 in {state["state1"].dtype for state in states}
    folder = Path(trainer.args.output_dir)
    wanted = load_file(next((folder / "checkpoint-4").glob("*.safetensors")))
    made(stack, **settings).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    found = load_file(next((folder / "checkpoint-4").glob("*.safetensors")))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are pages here")
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_pages_without_a_device_are_refused(name: str) -> None:
    """bitsandbytes itself warns, and goes on without them."""
    match = rf"needs a CUDA device.*\n  saw: --optimizer {name}, and no CUDA device\n  do: .* {name[6:]}: "
    with pytest.raises(InlayError, match=match):
        check_optimizer(make(**{**GIVEN, "optimizer": name}))


def test_an_optimizer_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(
        InlayError, match=r"the optimizer needs bitsandbytes\n.*--optimizer adamw_8bit, and no"
    ):
        check_optimizer(make(**{**GIVEN, "optimizer": "adamw_8bit"}))


@pytest.mark.parametrize("given", [{"double_quant": True}, {"compute_dtype": "bfloat16", "bits": 8}])
def test_what_is_for_four_bits_alone_is_refused_elsewhere(given: dict[str, Any]) -> None:
    name = next(iter(given)).replace("_", "-")
    with pytest.raises(InlayError, match=rf"{name} .*: it is for a base of 4 bits \(--bits 4\)"):
        make(**{**GIVEN, **given})
