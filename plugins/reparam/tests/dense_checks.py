"""A method of linear layers beside its change ΔW (out, in), which the test writes out from the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.authoring import LinearDelta, Method
from inlay.testing.layers import deltas_of, fit, settled, watch
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake

Change = Callable[[Mapping[str, Tensor], int, int], Tensor]


def adapted(family: str, method: Method, **changes: object) -> nn.Module:
    """Return a tiny float64 model with the method on it, every tensor of it away from its start."""
    model = settled(family, **changes).double()
    inlay.attach(model, method, seed=0)
    shake(model)
    return model


def values(delta: nn.Module) -> dict[str, Tensor]:
    """Return a delta's own tensors by name, detached."""
    return {name: p.detach().clone() for name, p in delta.named_parameters()}


def agrees(family: str, method: Method, change: Change) -> None:
    """Assert that every layer gives x (W + ΔW)ᵀ + b, merges to W + ΔW, and has autograd's gradients.

    `change(tensors, out, in)` is ΔW; all to 1e-9 in float64.
    """
    model = adapted(family, method)
    batch = batch_for(model)
    expected: dict[str, Tensor] = {}
    for site, delta in deltas_of(model).items():
        layer = model.get_submodule(site)
        weight = layer.weight.detach().T if type(layer).__name__ == "Conv1D" else layer.weight.detach()
        dense = change(values(delta), *weight.shape)
        assert float(dense.norm()) > 0.01 * float(weight.norm()), f"{site}: the change hardly acts"
        x, y = watch(model, site, batch)
        assert distance(y, F.linear(x, weight + dense, layer.bias)) < 1e-9, site
        same_gradients(delta, change, x, tuple(weight.shape))
        expected[site] = weight + dense
    before = model(**batch).logits
    inlay.merge(model, undo=False)
    for site, weight in expected.items():
        layer = model.get_submodule(site)
        merged = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
        assert distance(merged, weight) < 1e-9, site
    assert distance(model(**batch).logits, before) < 1e-9


def same_gradients(delta: nn.Module, change: Change, x: Tensor, shape: tuple[int, int]) -> None:
    """Assert that gradients of x and every tensor through `effect` are those through the dense ΔW."""
    assert isinstance(delta, LinearDelta)
    x = x.clone().requires_grad_()
    direction = torch.randn(
        *x.shape[:-1], shape[0], dtype=x.dtype, generator=torch.Generator().manual_seed(0)
    )
    own = dict(delta.named_parameters())
    for parameter in own.values():
        parameter.requires_grad_()
    found = torch.autograd.grad((delta.effect(x) * direction).sum(), [x, *own.values()])
    free = {name: value.requires_grad_() for name, value in values(delta).items()}
    dense = F.linear(x, change(free, *shape))
    wanted = torch.autograd.grad((dense * direction).sum(), [x, *free.values()])
    for name, a, b in zip(("x", *own), found, wanted, strict=True):
        assert distance(a, b) < 1e-9, name


def learns(family: str, method: Method, *, below: float = 0.1, steps: int = 100) -> None:
    """Assert that the loss on one batch falls below a part of its start at the method's own rate."""
    model = settled(family)
    inlay.attach(model, method, seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True), steps=steps)
    assert before > 0.5
    assert after < below * before
    inlay.check_training(model)


def starts_at_the_base(family: str, method: Method) -> None:
    """Assert that not a bit of the logits changes when the method is attached."""
    model = settled(family)
    batch = batch_for(model)
    with torch.no_grad():
        model(**batch)
        before = model(**batch).logits
        inlay.attach(model, method, seed=0)
        assert torch.equal(model(**batch).logits, before)
