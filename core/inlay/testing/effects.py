"""Running tiny models, measuring what adapters do to their output, moving adapters off their start."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay import masks
from inlay.stack import Placed, need_state
from inlay.testing.cases import NAME, Case
from inlay.testing.models import batch_for
from inlay.testing.rule import RuleBroken, need

LEAST, MOST = 0.05, 1.0
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2, weight_decay=0.1),
}


def output(model: nn.Module, batch: dict[str, Any] | None = None) -> Tensor:
    """Return the model's logits on `batch` (default: three rows)."""
    with torch.no_grad():
        logits: Tensor = model(**(batch_for(model) if batch is None else batch)).logits
    return logits


def output_of(model: nn.Module, *names: str, batch: dict[str, Any] | None = None) -> Tensor:
    """Return the logits under the named adapters alone."""
    with inlay.use(model, *names):
        return output(model, batch)


def distance(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ in float64."""
    return float((a.double() - b.double()).norm())


def share(changed: Tensor, base: Tensor) -> float:
    """Return ‖changed − base‖ / ‖base‖."""
    return distance(changed, base) / max(float(base.double().norm()), 1e-30)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether no entry differs by more than `tolerance` of the largest (or of 1)."""
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def stir(model: nn.Module, case: Case, name: str = NAME, *, merging: bool = False) -> None:
    """Move each part's weights until it alone changes the output by 5 % to 100 % of its norm.

    Everything a rule compares afterwards then has an effect to be wrong about. With `merging` the
    parts that merge also change it together by as much.
    """
    parts = need_state(model).find(name)
    for attempt in range(8):
        for number, placed in enumerate(parts):
            _stir(model, placed, seed=1000 * attempt + 10 * case.seed + number, most=MOST / len(parts))
        if not merging or LEAST <= effect_of_merging(model, case) <= MOST:
            return
    raise RuleBroken(f"no weights give {case.merging()} a joint effect between {LEAST} and {MOST}")


def effect_of_merging(model: nn.Module, case: Case) -> float:
    """Return what the parts that merge change, as a share of the output without them."""
    everything = [f"{NAME}/{m.name}" for m in case.members]
    return share(output_of(model, *everything), output_of(model, *case.lasting()))


def _stir(model: nn.Module, placed: Placed, *, seed: int, most: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = masks.mask_of(placed)
    tensors = [p for n, p in placed.adapter.named_parameters() if mask[n]]
    starts = [p.detach().clone() for p in tensors]
    noises = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in tensors]
    plain, size = output_of(model), 0.1
    most = most if placed.method.starts_as_identity else math.inf
    for _ in range(60):
        _displace(tensors, starts, noises, size)
        effect = share(output_of(model, placed.path), plain)
        if 1.2 * LEAST <= effect <= max(most, 2 * LEAST):
            return
        size *= 1.6 if effect < 1.2 * LEAST else 0.8
    raise RuleBroken(
        f"{placed.path} changes the output by {effect:.1e} of its norm however its weights are set "
        f"(wanted {LEAST} to {most}): do its deltas run?"
    )


def _displace(tensors: Sequence[Tensor], starts: Sequence[Tensor], noises: Sequence[Tensor], size: float) -> None:
    with torch.no_grad():
        for tensor, start, noise in zip(tensors, starts, noises, strict=True):
            tensor.copy_(start + size * noise)


def backward(model: nn.Module, seed: int = 0) -> None:
    """Run one forward and backward pass in training mode."""
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss = model(**batch_for(model, seed=seed, labels=True)).loss + inlay.auxiliary_loss(model)
        loss.backward()
    model.eval()


def train(model: nn.Module, kind: str = "AdamW", *, whole: bool = False, steps: int = 3) -> None:
    """Take a few optimizer steps; with `whole`, the optimizer is given every parameter of the model."""
    optimizer = OPTIMIZERS[kind](list(model.parameters()) if whole else inlay.parameter_groups(model))
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, seed=step)
        optimizer.step()
    optimizer.zero_grad()


def tensors_of(model: nn.Module, name: str = NAME) -> dict[str, Tensor]:
    """Return copies of an adapter's tensors by part and local name."""
    return {
        f"{placed.path}:{key}": tensor.detach().clone()
        for placed in need_state(model).find(name)
        for key, tensor in placed.adapter.tensors().items()
    }


def in_float64(model: nn.Module) -> nn.Module:
    """Return a copy of an adapted model that computes in float64."""
    return copy.deepcopy(model).double()


def same_output(a: Tensor, b: Tensor, what: str) -> None:
    """Raise unless two outputs are bit for bit the same."""
    need(a.dtype == b.dtype and a.shape == b.shape, f"{what}: {a.dtype}{tuple(a.shape)} became {b.dtype}{tuple(b.shape)}")
    need(torch.equal(a, b), f"{what}: the output differs by {float((a - b).abs().max()):.3g}")
