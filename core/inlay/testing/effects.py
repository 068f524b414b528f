"""Running tiny models, measuring what adapters do to their output, moving adapters off their start."""

from __future__ import annotations

import copy
import math
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
    moves = {p.path: Move(model, p, seed=10 * case.seed + i) for i, p in enumerate(parts)}
    for move in moves.values():
        move.search(most=MOST / len(parts))
    if not merging:
        return
    for _ in range(40):
        effect = effect_of_merging(model, case)
        if LEAST <= effect <= MOST:
            return
        for path in case.merging():
            moves[path].resize(1.3 if effect < LEAST else 0.8)
    raise RuleBroken(f"no weights give {case.merging()} a joint effect between {LEAST} and {MOST}")


def effect_of_merging(model: nn.Module, case: Case) -> float:
    """Return what the parts that merge change, as a share of the output without them."""
    everything = [f"{NAME}/{m.name}" for m in case.members]
    return share(output_of(model, *everything), output_of(model, *case.lasting()))


class Move:
    """A part's trainable tensors, moved from their start in a fixed random direction."""

    def __init__(self, model: nn.Module, placed: Placed, *, seed: int) -> None:
        self.model, self.placed, self.size = model, placed, 0.1
        generator, mask = torch.Generator().manual_seed(seed), masks.mask_of(placed)
        self.tensors = [p for n, p in placed.adapter.named_parameters() if mask[n]]
        self.starts = [p.detach().clone() for p in self.tensors]
        self.noises = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in self.tensors]

    def search(self, most: float) -> None:
        """Find a size at which the part alone has an effect between LEAST and `most` of the output."""
        plain, least = output_of(self.model), 1.2 * LEAST
        most = max(most, 2 * LEAST) if self.placed.method.starts_as_identity else math.inf
        effect = 0.0
        for _ in range(60):
            self.resize(1.0)
            effect = share(output_of(self.model, self.placed.path), plain)
            if least <= effect <= most:
                return
            self.size *= 1.6 if effect < least else 0.8
        raise RuleBroken(
            f"{self.placed.path} changes the output by {effect:.1e} of its norm however its weights are set "
            f"(wanted {LEAST} to {most}): do its deltas run?"
        )

    def resize(self, factor: float) -> None:
        """Multiply the size of the move, and move."""
        self.size *= factor
        with torch.no_grad():
            for tensor, start, noise in zip(self.tensors, self.starts, self.noises, strict=True):
                tensor.copy_(start + self.size * noise)


def acting(case: Case) -> nn.Module:
    """Return a fresh model with the stack attached as "fr", each part of which has an effect."""
    model = case.attached()
    stir(model, case)
    return model


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every gradient there is, by the parameter's name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_gradient(model: nn.Module) -> list[str]:
    """Return the names of what learns whose gradient is missing, of another dtype, or not finite."""
    learning = [(name, p, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    return [n for n, p, g in learning if g is None or g.dtype != p.dtype or not g.isfinite().all()]


def backward(model: nn.Module, seed: int = 0) -> None:
    """Run one forward and backward pass in training mode."""
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss = model(**batch_for(model, seed=seed, labels=True)).loss + inlay.auxiliary_loss(model)
        loss.backward()
    model.eval()


def train(
    model: nn.Module, kind: str = "AdamW", *, whole: bool = False, steps: int = 3, lr: float | None = None
) -> None:
    """Take a few optimizer steps; with `whole`, the optimizer is given every parameter of the model."""
    optimizer = OPTIMIZERS[kind](list(model.parameters()) if whole else inlay.parameter_groups(model, lr))
    for group in optimizer.param_groups if lr is not None else ():
        group["lr"] = lr
    inlay.lifecycle(model, optimizer, steps)
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
    need(
        a.dtype == b.dtype and a.shape == b.shape,
        f"{what}: {a.dtype}{tuple(a.shape)} became {b.dtype}{tuple(b.shape)}",
    )
    need(torch.equal(a, b), f"{what}: the output differs by {float((a - b).abs().max()):.3g}")
