"""What LoRA's descendants compute, beside the catalogue's formulas in plain torch, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.authoring import Method
from inlay.testing.layers import deltas_of, fit, settled
from inlay.testing.models import batch_for, build
from inlay.testing.tools import distance, shake
from inlay_lora import LoRADropout, LoRAFA, LoRAPlus, MoSLoRA, PeriodicLoRA, QALoRA

Tensors = dict[str, Tensor]
Change = Callable[[Tensor, Tensors], Tensor]


def lora(s: float) -> Change:
    return lambda x, t: s * ((x @ t["down"].T) @ t["up"].T)


def mixed(s: float) -> Change:
    return lambda x, t: s * (((x @ t["down"].T) @ t["mixer"].T) @ t["up"].T)


def grouped(s: float, g: int) -> Change:
    def change(x: Tensor, t: Tensors) -> Tensor:
        means = torch.stack([x[..., i : i + g].sum(-1) / g for i in range(0, x.shape[-1], g)], -1)
        return s * ((means @ t["down"].T) @ t["up"].T)

    return change


ROOT2 = math.sqrt(2)
CASES: dict[str, tuple[Method, Change]] = {
    "moslora": (MoSLoRA(rank=3, alpha=6, targets=("query", "down")), mixed(2)),
    "moslora, rsqrt": (
        MoSLoRA(rank=2, alpha=2, scaling="rsqrt", mixer="orthogonal", targets=("query", "down")),
        mixed(ROOT2),
    ),
    "lora_plus": (LoRAPlus(rank=3, alpha=6, targets=("query", "down")), lora(2)),
    "lora_fa": (LoRAFA(rank=3, alpha=6, corrected=False, targets=("query", "down")), lora(2)),
    "qa_lora": (QALoRA(rank=3, alpha=6, group=4, targets=("query", "down")), grouped(2, 4)),
    "lora_dropout": (LoRADropout(rank=3, alpha=6, dropout=0.5, targets=("query", "down")), lora(2 * 0.25)),
    "lora_dropout, rescaled": (
        LoRADropout(rank=3, alpha=6, dropout=0.5, rescale=True, targets=("query", "down")),
        lora(2),
    ),
    "periodic_lora": (PeriodicLoRA(rank=3, alpha=6, targets=("query", "down")), lora(2)),
}
SITES = {
    "llama": ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"),
    "bert": ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"),
    "gpt2": ("transformer.h.1.mlp.c_proj",),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
EVERY_SITE = pytest.mark.parametrize(
    ("family", "site"), [(f, s) for f, sites in SITES.items() for s in sites]
)


def adapted(family: str, method: Method) -> nn.Module:
    """Return a tiny float64 model with the method, every tensor of it away from its start."""
    model = settled(family).double()
    inlay.attach(model, method, seed=0)
    shake(model)
    return model


def plain(layer: Any, x: Tensor) -> Tensor:
    """Return what the layer gives without adapters."""
    weight = layer.weight.T if type(layer).__name__.endswith("Conv1D") else layer.weight
    return F.linear(x, weight, layer.bias)


def read(layer: Any) -> Tensor:
    """Return something for the layer to read (2, 5, in)."""
    rows = layer.weight.shape[0 if type(layer).__name__.endswith("Conv1D") else 1]
    return torch.randn(2, 5, rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tensors(model: nn.Module, site: str) -> Tensors:
    return {
        name: t.detach().clone() for name, t in deltas_of(model)[site].state_dict(keep_vars=True).items()
    } | {name: t.detach().clone() for name, t in deltas_of(model)[site].named_buffers()}


@EVERY_CASE
@EVERY_SITE
def test_forward_and_gradients_are_the_formula(family: str, site: str, case: str) -> None:
    method, change = CASES[case]
    model = adapted(family, method)
    layer, delta = model.get_submodule(site), deltas_of(model)[site]
    own = {
        name: t.requires_grad_(name in dict(delta.named_parameters()))
        for name, t in tensors(model, site).items()
    }
    x, other = read(layer).requires_grad_(), read(layer).requires_grad_()
    y, expected = layer(x), plain(layer, other) + change(other, own)
    assert distance(y, expected) < 1e-12
    assert distance(y, plain(layer, x)) > 0.02
    for result in (y, expected):
        result.sin().sum().backward()
    assert x.grad is not None
    assert other.grad is not None
    assert distance(x.grad, other.grad) < 1e-12
    for name, parameter in delta.named_parameters():
        assert parameter.grad is not None
        assert own[name].grad is not None
        assert distance(parameter.grad, own[name].grad) < 1e-12, name  # type: ignore[arg-type]


@EVERY_CASE
@EVERY_SITE
def test_the_merged_weight_is_the_formula_of_unit_vectors(family: str, site: str, case: str) -> None:
    method, change = CASES[case]
    model = adapted(family, method)
    layer: Any = model.get_submodule(site)
    conv1d = type(layer).__name__.endswith("Conv1D")
    weight = (layer.weight.T if conv1d else layer.weight).detach().clone()
    expected = weight + change(torch.eye(weight.shape[1], dtype=torch.float64), tensors(model, site)).T
    batch = batch_for(model)
    before = model(**batch).logits.detach()
    assert inlay.merge(model, undo=False).worst < 1e-5
    merged = model.get_submodule(site).weight
    assert distance(merged.T if conv1d else merged, expected) < 1e-7  # type: ignore[operator]
    assert distance(model(**batch).logits, before) < 1e-6


@EVERY_CASE
@torch.no_grad()
def test_starts_exactly_at_the_base(case: str) -> None:
    model = build("bert")
    batch = batch_for(model)
    before = model(**batch).logits
    inlay.attach(model, CASES[case][0])
    assert torch.equal(model(**batch).logits, before)
    if "dropout" in case:
        model.train()
        layer = model.get_submodule(SITES["bert"][0])
        assert torch.equal(layer(x := torch.randn(3, 32)), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("method", [MoSLoRA, LoRAPlus, LoRAFA, QALoRA, LoRADropout, PeriodicLoRA])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_it_learns_at_its_own_rate(method: type[Method], family: str) -> None:
    model = settled(family)
    smaller = {"group": 4} if method is QALoRA else {}
    inlay.attach(model, method(targets=("linear",), **smaller), seed=0)
    before, after = fit(model, batch_for(model, rows=4, labels=True), steps=100)
    assert after < 0.1 * before
    inlay.check_training(model)
