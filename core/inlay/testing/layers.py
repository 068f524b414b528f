"""Looking at single layers of an adapted model, and training it on one batch, for tests of methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.delta import Delta
from inlay.stack import need_state
from inlay.testing.effects import gradients_of
from inlay.testing.tools import lively


def settled(family: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a `lively` model with its biases away from 0 and its norms' gains away from 1.

    A fresh model's biases are all 0: a fold that forgets them, or a method that scales them, would not show.
    """
    model = lively(family, seed=seed, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def deltas_of(model: nn.Module, name: str = "default") -> dict[str, Delta]:
    """Return the deltas of the adapter `name` by the name of their site."""
    return {
        site.name: delta for placed in need_state(model).find(name) for site, delta in placed.adapter.placed
    }


def watch(model: nn.Module, path: str, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run `model`; return the (input, output) of the first call of the module at `path`."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        seen.append((first.detach(), output.detach()))

    handle = model.get_submodule(path).register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        handle.remove()
    return seen[0]


def fit(model: nn.Module, batch: dict[str, Any], *, steps: int = 60) -> tuple[float, float]:
    """Take AdamW steps on one batch at the methods' own rates; return the loss before and after."""
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    inlay.lifecycle(model, optimizer, steps)
    losses = []
    for step in range(steps + 1):
        loss = model(**batch).loss + inlay.auxiliary_loss(model)
        losses.append(float(loss.detach()))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses[0], losses[-1]


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return the gradient of the loss on `batch` for every parameter that has one, by name."""
    model.zero_grad()
    model(**batch).loss.backward()
    return gradients_of(model)
