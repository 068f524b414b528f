"""A method's layers beside plain ones whose weight is written out: outputs, gradients, merged weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.authoring import Delta, Method, ModuleSite
from inlay.stack import need_state
from inlay.testing.tools import distance, shake

# W' (out, in) of (delta, W), in plain torch.
Written = Callable[[Any, Tensor], Tensor]


def placed(model: nn.Module) -> list[tuple[ModuleSite, Delta]]:
    """Return (site, delta) of the only adapter."""
    (found,) = need_state(model).placed.values()
    return found.adapter.placed  # type: ignore[return-value]


def plain(model: nn.Module, site: ModuleSite) -> tuple[Tensor, Tensor | None]:
    """Return a site's weight (out, in) and bias as its module holds them."""
    layer: Any = model.get_submodule(site.name.partition("[")[0])
    weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T
    rows = slice(site.part.start, site.part.stop) if site.part else slice(None)
    return weight[rows], None if layer.bias is None else layer.bias.detach()[rows]


def agrees(model: nn.Module, method: Method, written: Written, *, tolerance: float = 1e-9) -> None:
    """Assert that every adapted layer is, in float64, the plain layer with the weight that is written out.

    In its output, in the gradients of its input and of every tensor that learns, and once merged.
    """
    model = model.double()
    inlay.attach(model, method, seed=0)
    shake(model)
    generator = torch.Generator().manual_seed(1)
    expected: dict[str, Tensor] = {}
    for site, delta in placed(model):
        layer = model.get_submodule(site.name.partition("[")[0])
        weight, bias = plain(model, site)
        x = torch.randn(2, 3, site.in_features, generator=generator, dtype=torch.float64).requires_grad_()
        g = torch.randn(2, 3, site.out_features, generator=generator, dtype=torch.float64)
        rows = slice(site.part.start, site.part.stop) if site.part else slice(None)
        changed = written(delta, weight)
        theirs, ours = F.linear(x, changed, bias), layer(x)[..., rows]
        assert distance(ours, theirs) < tolerance, site.name
        assert distance(changed, weight) > 1e-3, site.name
        learning = [x, *dict.fromkeys(delta.reached())]
        for a, b in zip(*(torch.autograd.grad((y * g).sum(), learning) for y in (ours, theirs)), strict=True):
            assert distance(a, b) < tolerance, site.name
        expected[site.name] = changed.detach()
    sites = [site for site, _ in placed(model)]
    assert inlay.merge(model).worst < tolerance
    for site in sites:
        assert distance(plain(model, site)[0], expected[site.name]) < tolerance, site.name
