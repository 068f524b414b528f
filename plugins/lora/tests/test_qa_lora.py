"""QA-LoRA: groups, counts, and folding into the zero points of quantised weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import deltas_of, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake
from inlay_lora import EVA, LoRA, QALoRA


def quantised(weight: Tensor, group: int, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (out, in), and scale and zero (out, in/group), of W ≈ scale·(codes − zero)."""
    rows = weight.unflatten(1, (-1, group))
    low, high = rows.amin(-1), rows.amax(-1)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    codes = (rows / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(1).to(torch.uint8), scale, zero


def read(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    group = codes.shape[1] // scale.shape[1]
    return scale.repeat_interleave(group, 1) * (codes.float() - zero.repeat_interleave(group, 1))


def layer_of(weight: Tensor, method: QALoRA) -> tuple[nn.Module, Any]:
    """Return a linear layer of that weight, adapted, and its delta."""
    model = nn.ModuleDict({"layer": nn.Linear(weight.shape[1], weight.shape[0])})
    with torch.no_grad():
        model["layer"].weight.copy_(weight)
    inlay.attach(model, method, seed=0)
    shake(model)
    delta: Any = next(iter(deltas_of(model).values()))
    with torch.no_grad():
        delta.up.mul_(10)  # what the layer reads averages out: let it act
    return model["layer"], delta


def test_the_change_folds_into_the_zero_points_and_nothing_else_moves() -> None:
    codes, scale, zero = quantised(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), 16)
    before = codes.clone(), scale.clone(), zero.clone()
    layer, delta = layer_of(read(codes, scale, zero), QALoRA(rank=3, alpha=6, group=16, targets=["layer"]))
    moved = delta.zeros(scale, zero)
    x = torch.randn(5, 64)
    assert distance(F.linear(x, read(codes, scale, moved), layer.bias), layer(x)) < 1e-6  # type: ignore[arg-type]
    assert distance(F.linear(x, read(codes, scale, zero), layer.bias), layer(x)) > 0.05  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, (codes, scale, zero), strict=True))
    assert delta.zeros(scale.half(), zero).dtype == torch.float32
    assert delta.zeros(scale.double(), zero).dtype == torch.float64


def test_it_folds_into_torchaos_own_layers() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    shifted = MappingType.ASYMMETRIC
    base = IntxUnpackedToInt8Tensor.from_hp(weight, (1, 32), torch.int4, mapping_type=shifted)  # type: ignore[attr-defined]
    layer, delta = layer_of(base.dequantize(), QALoRA(rank=2, group=32, targets=["layer"]))
    moved = IntxUnpackedToInt8Tensor(
        base.qdata, base.scale, delta.zeros(base.scale, base.zero_point),
        base.target_dtype, base.block_size, base.dtype, None,
    )  # fmt: skip
    x = torch.randn(5, 64)
    assert distance(F.linear(x, moved, layer.bias), layer(x)) < 1e-6  # type: ignore[arg-type]
    assert distance(F.linear(x, base, layer.bias), layer(x)) > 0.05  # type: ignore[arg-type]


def test_zero_points_of_another_shape_are_refused() -> None:
    _, delta = layer_of(torch.randn(24, 64), QALoRA(rank=3, group=16, targets=["layer"]))
    with pytest.raises(
        ConfigError, match=r"not the scales and zero points[\s\S]*group of 16 inputs: \(24, 4\)"
    ):
        delta.zeros(torch.ones(24, 2), torch.ones(24, 2))


def test_groups_of_one_are_lora() -> None:
    model, other = settled("bert"), settled("bert")
    inlay.attach(model, QALoRA(rank=4, group=1, targets=("query",)), seed=0)
    inlay.attach(other, LoRA(rank=4, targets=("query",)), seed=0)
    shake(model)
    shake(other)
    batch = batch_for(model)
    assert distance(model(**batch).logits, other(**batch).logits) < 1e-6


def test_means_are_dropped_and_not_inputs() -> None:
    layer, delta = layer_of(torch.zeros(24, 64), QALoRA(rank=2, group=32, dropout=0.5, targets=["layer"]))
    layer.train()
    x = torch.randn(1, 64)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    means = F.dropout(x.view(1, 2, 32).mean(-1), 0.5)
    expected = 8 / 3 * means @ delta.down.T @ delta.up.T + layer.bias  # type: ignore[operator]
    assert distance(y, expected) < 1e-6


def test_count() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": nn.Linear(4096, 4096)})
    assert inlay.plan(model, QALoRA(rank=64, targets=["layer"])).parameters == 64 * (128 + 4096) == 270_336


def test_inputs_that_do_not_divide_are_refused_with_what_would_work() -> None:
    with pytest.raises(
        ConfigError, match=r"do not divide into groups[\s\S]*group=5[\s\S]*1, 2, 4, 8, 16, 32:"
    ):
        inlay.attach(settled("bert"), QALoRA(group=5))


def test_a_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="reads means of inputs, for which no start is known"):
        QALoRA(start=EVA())
