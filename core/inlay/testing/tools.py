"""Small tools for tests of adapted models: models that react, adapters that act, distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.stack import need_state
from inlay.testing import models
from inlay.testing.cases import lively_settings


def lively(family: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a seeded tiny model in evaluation mode whose attention is far from uniform.

    At the usual initialisation (std 0.02) a tiny model's layers hardly act, and a wrong mask hardly shows.
    """
    changes = {**lively_settings(family), **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(models, family)(**changes)
    return model.eval()


@torch.no_grad()
def shake(model: nn.Module, *names: str, seed: int = 0, size: float = 0.3) -> None:
    """Add noise to every tensor of the named adapters (default: all), so that each of them acts."""
    state = need_state(model)
    chosen = state.find_all(names) if names else list(state.placed.values())
    generator = torch.Generator().manual_seed(seed)
    for placed in chosen:
        for _, parameter in placed.adapter.named_parameters():
            width = parameter.shape[-1] if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator) * size / width**0.5
            parameter.add_(noise.to(parameter))


def distance(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖ in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
