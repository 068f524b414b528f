"""LoftQ: what few bits lost, made up for; and its rounds that make the few bits themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import inlay
from inlay.backends import backend_of
from inlay.errors import ConfigError
from inlay.testing.effects import output
from inlay.testing.layers import deltas_of
from inlay.testing.quantised import PACKED_SIZES, kinds, packed
from inlay.testing.refusal import refused
from inlay.testing.tools import distance, lively, shake
from inlay_lora import DoRA, LoftQ, LoRA, alternate

PATH = "model.layers.0.self_attn.q_proj"
EVERY_KIND = pytest.mark.parametrize("kind", [k for k in kinds() if k in ("nf4", "int8", "torchao int4")])


def saved(folder: Path, prefix: str = "") -> str:
    """Write the full model's weights, in two files; return the folder."""
    tensors = {prefix + k: t.clone() for k, t in lively("llama", **PACKED_SIZES).state_dict().items()}
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
    return str(folder)


@EVERY_KIND
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_it_is_the_best_correction_of_the_error_whatever_s(method: type, kind: str, tmp_path: Path) -> None:
    full, model = lively("llama", **PACKED_SIZES), packed("llama", kind, **PACKED_SIZES)
    start, wanted = LoftQ(weights=saved(tmp_path)), output(full)
    few_bits = output(packed("llama", kind, **PACKED_SIZES))
    lossy = backend_of(model.get_submodule(PATH)).dequantize(model.get_submodule(PATH))
    error, lefts = full.get_submodule(PATH).weight.detach() - lossy, [float("inf")]
    for rank in (2, 8):
        adapted = packed("llama", kind, **PACKED_SIZES)
        inlay.attach(adapted, method(rank=rank, alpha=12, start=start, targets=["linear"]), seed=0)
        delta = deltas_of(adapted)[PATH]
        left = error - 12 / rank * delta.up.detach() @ delta.down.detach()
        assert left.norm() == pytest.approx(float(torch.linalg.svdvals(error)[rank:].norm()), rel=1e-3)
        lefts.append(distance(output(adapted), wanted))
        assert lefts[-1] < lefts[-2]
    assert lefts[1] < distance(few_bits, wanted)


def test_its_checkpoint_needs_the_weights_no_more(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    (tmp_path / "full").mkdir()
    model, fresh = (packed("llama", "nf4", **PACKED_SIZES) for _ in range(2))
    inlay.attach(model, LoRA(rank=2, start=LoftQ(weights=saved(tmp_path / "full", "base."))), seed=0)
    shake(model)
    inlay.save(model, tmp_path / "adapter")
    for file in (tmp_path / "full").iterdir():
        file.unlink()
    inlay.load(fresh, tmp_path / "adapter")
    assert torch.equal(output(fresh), output(model))


def rounded(weight: Tensor) -> Tensor:
    """Return a weight as 3 bits with one scale per row keep it."""
    scale = weight.abs().amax(1, keepdim=True) / 3
    return (weight / scale).round().clamp(-4, 3) * scale


def test_rounds_of_quantising_and_decomposing() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 16)
    errors = []
    for rank in (1, 4, 16):
        lossy, down, up = alternate(weight, rank, rounded, steps=1)
        assert torch.equal(lossy, rounded(weight))
        errors.append(float((weight - lossy - up @ down).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < (weight - rounded(weight)).norm()
    assert errors[-1] < 1e-4
    lossy, down, up = alternate(weight, 4, rounded)
    assert (weight - lossy - up @ down).norm() < errors[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: [p.unlink() for p in f.iterdir()],
            r"of a layer is not to be found\n.*in 0 files",
        ),
        (
            lambda f: save_file({f"{PATH}.weight": torch.zeros(2, 2)}, f / "a.safetensors"),
            r"\(2, 2\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = packed("llama", "nf4", **PACKED_SIZES)
    weights = saved(tmp_path)
    change(tmp_path)
    with refused(ConfigError, message, model=model):
        inlay.attach(model, LoRA(rank=2, start=LoftQ(weights=weights)))


def test_a_base_that_is_not_quantised_is_refused() -> None:
    model: nn.Module = lively("llama")
    with refused(ConfigError, r"loftq: the layer is not in few bits.*\n.*q_proj \(linear\)", model=model):
        inlay.attach(model, LoRA(start=LoftQ(weights="nowhere")))
