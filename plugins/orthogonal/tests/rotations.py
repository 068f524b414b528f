"""The methods by dense matrices, from the published formulas, and one layer compared with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.delta import Delta
from inlay.stack import need_state
from inlay.testing.layers import settled
from inlay.testing.tools import distance, shake

Layer = tuple[Tensor, Tensor | None]  # weight (out, in) and bias
SITES = {
    "llama": ("model.layers.1.mlp.down_proj", "down"),
    "bert": ("bert.encoder.layer.0.attention.self.query", "query"),
    "gpt2": ("transformer.h.0.mlp.c_fc", "up"),
}


def skew_of(triangle: Tensor, size: int) -> Tensor:
    """Return S from its strict upper triangle, entry by entry."""
    s = torch.zeros(size, size, dtype=triangle.dtype)
    position = 0
    for i in range(size):
        for j in range(i + 1, size):
            s[i, j], s[j, i] = triangle[position], -triangle[position]
            position += 1
    return s


def exact(s: Tensor) -> Tensor:
    """Return (I + S)(I − S)⁻¹."""
    one = torch.eye(len(s), dtype=s.dtype)
    return (one + s) @ torch.linalg.inv(one - s)


def series(s: Tensor, terms: int) -> Tensor:
    """Return (I + S)(I + S + … + S^(T−2))."""
    one = torch.eye(len(s), dtype=s.dtype)
    return (one + s) @ sum((torch.linalg.matrix_power(s, n) for n in range(terms - 1)), torch.zeros_like(s))


def adapted(family: str, method: Any, *, size: float = 0.5, double: bool = True) -> nn.Module:
    """Return a tiny model with the method, its tensors well away from their start."""
    model = settled(family)
    model = model.double() if double else model
    inlay.attach(model, method, seed=0)
    shake(model, size=size)
    return model


def placed_at(model: nn.Module, site: str) -> list[Delta]:
    """Return the deltas of one site, in order."""
    return [
        d for placed in need_state(model).placed.values() for s, d in placed.adapter.placed if s.name == site
    ]


def plain(layer: Any) -> Layer:
    """Return a layer's own weight as (out, in) and its bias."""
    weight = layer.weight.detach()
    return (weight.T if type(layer).__name__ == "Conv1D" else weight), layer.bias


def check_layer(
    family: str, method: Callable[[str], Any], change: Callable[[dict[str, Tensor], Layer], Layer]
) -> None:
    """Compare forward, gradients and merged weight of one layer with `change` of its tensors and layer."""
    path, role = SITES[family]
    model = adapted(family, method(role))
    layer = model.get_submodule(path)
    own = [(n, p) for d in placed_at(model, path) for n, p in d.named_parameters()]
    copies = {n.rpartition(".")[2]: p.detach().clone().requires_grad_() for n, p in own}
    x = torch.randn(
        2, 5, plain(layer)[0].shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    inner, outer = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight, bias = change(copies, plain(layer))
    expected, got = F.linear(outer, weight, bias), layer(inner)
    assert distance(got, expected) < 1e-12
    assert distance(got, F.linear(x, *plain(layer))) > 0.01
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected.backward(cotangent)
    got.backward(cotangent)
    assert inner.grad is not None
    assert distance(inner.grad, outer.grad) < 1e-12  # type: ignore[arg-type]
    for name, parameter in own:
        wanted = copies[name.rpartition(".")[2]].grad
        assert parameter.grad is not None
        assert wanted is not None
        assert distance(parameter.grad, wanted) < 1e-11, name
    inlay.merge(model, undo=False)
    merged, shift = plain(model.get_submodule(path))
    assert distance(merged, weight) < 1e-12
    if bias is not None:
        assert shift is not None
        assert distance(shift, bias) < 1e-12
