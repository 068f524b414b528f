"""AdaLoRA: a budget of ranks, shared out among layers by what each rank is worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inlay.authoring import Adapter, ConfigError, Init, Method, Site, Step, hookimpl, setting
from inlay_lora_rank.ranked import Ranked, check_rank

KEPT = ".kept"  # which ranks of a layer were left, once the budget is the last one


class Triplets(Ranked):
    """Δy = s·((drop(x) Aᵀ) ⊙ E) Bᵀ: `values` = E (r,); a rank whose value is 0 is out."""

    def __init__(self, site: Site, init: Init, method: AdaLoRA) -> None:
        super().__init__()
        check_rank(method.id, method.rank, site)
        self.down = init.normal(method.rank, site.in_features, std=0.02)
        self.up = init.normal(site.out_features, method.rank, std=0.02)
        self.values = init.zeros(method.rank)
        self.scale, self.rate = method.alpha / (method.rank + 1e-5), method.dropout

    def weights(self) -> Tensor:
        return self.scale * self.values


@dataclass(frozen=True)
class AdaLoRA(Method):
    """LoRA as a singular value decomposition, whose ranks move to the layers that need them.

        y = x Wᵀ + bias + s·((drop(x) Aᵀ) ⊙ E) Bᵀ,   A (r, in), B (out, r) ~ N(0, 0.02²), E (r,) = 0

    s = alpha / (r + 1e-5), whatever is left of the r. After each step a rank's worth is how much the
    loss depends on E, A and B there (|θ·∂L/∂θ| and its spread, smoothed by beta1 and beta2); the
    budget falls by a cubic from r to `target_rank` per layer between step `t_init` and the last
    `t_final` steps, and each `every` steps those worth least, of all layers, have E set to 0. They
    may come back until the budget is the last one. Loss + orthogonality·mean(‖A Aᵀ − I‖, ‖Bᵀ B − I‖).

    Parameters: r·(in + out + 1) per layer. arXiv 2303.10512, QingruZhang/AdaLoRA and huggingface/peft.
    Differs: exactly the budget is kept, ties going to the first (references drop all equal ranks).
    """

    id: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "2303.10512"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    default_targets: ClassVar[tuple[str, ...]] = ("linear",)
    lr: ClassVar[float] = 5e-3

    rank: int = setting(12, least=1)
    target_rank: int = setting(8, least=1)
    alpha: float = setting(8.0, above=0)
    dropout: float = setting(0.0, least=0, below=1)
    t_init: int = setting(0, least=0)
    t_final: int = setting(0, least=0)
    every: int = setting(1, least=1)
    beta1: float = setting(0.85, above=0, below=1)
    beta2: float = setting(0.85, above=0, below=1)
    orthogonality: float = setting(0.5, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_rank > self.rank:
            raise ConfigError(
                "adalora: the budget cannot grow in training",
                saw=f"rank={self.rank}, target_rank={self.target_rank}",
                do="give a target_rank that is at most the rank, such as two thirds of it",
            )

    def delta(self, site: Site, init: Init) -> Triplets:
        return Triplets(site, init, self)

    def last(self, step: Step) -> int:
        """Return the step at which the budget is the last one; raise if there is none."""
        if step.total is None:
            raise ConfigError(
                "adalora: its budget falls over all of training, and how long that is is not known",
                saw="inlay.lifecycle(model, optimizer) without steps",
                do="say how many optimizer steps there will be: inlay.lifecycle(model, optimizer, steps=...)",
            )
        if step.total - self.t_final <= self.t_init:
            raise ConfigError(
                "adalora: no step is left in which the budget could fall",
                saw=f"{step.total} steps, of which t_init={self.t_init} and t_final={self.t_final}",
                do="train longer, or give a smaller t_init or t_final",
            )
        return step.total - self.t_final

    def budget(self, step: int, last: int, layers: int) -> int:
        """Return how many ranks the layers have together after a step, `last` the one of the last budget."""
        left = min(max(1 - (step - self.t_init) / (last - self.t_init), 0.0), 1.0)
        return int((self.rank - self.target_rank) * layers * left**3 + self.target_rank * layers)

    @staticmethod
    @hookimpl
    def auxiliary_loss(method: AdaLoRA, adapter: Adapter) -> Tensor | None:
        if not method.orthogonality:
            return None
        grams = [gram for _, d in _triplets(adapter) for gram in (d.down @ d.down.T, d.up.T @ d.up)]
        off = [(gram.float() - torch.eye(len(gram), device=gram.device)).norm() for gram in grams]
        return method.orthogonality * torch.stack([o.to(off[0].device) for o in off]).mean()

    @staticmethod
    @hookimpl
    def before_step(method: AdaLoRA, adapter: Adapter, step: Step) -> None:
        method.last(step)  # so that a schedule that cannot be is refused before training

    @staticmethod
    @hookimpl
    def after_step(method: AdaLoRA, adapter: Adapter, step: Step) -> None:
        last = method.last(step)
        learned = [(name, p) for name, p in adapter.named_parameters() if p.grad is not None]
        if not learned:  # another adapter is in use
            return
        for name, parameter in learned if step.number < last else ():
            _watch(method, step.memory, name, parameter)
        due = step.number > method.t_init and step.number % method.every == 0
        if step.number == last or (step.number < last and due):
            share_out(method, adapter, step, last)
        if step.number >= last:
            for name, delta in _triplets(adapter):
                delta.values.masked_fill_(~step.memory[f"{name}{KEPT}"], 0.0)


def _triplets(adapter: Adapter) -> Iterator[tuple[str, Triplets]]:
    """Yield each layer's delta by its local name."""
    yield from ((name, module) for name, module in adapter.modules() if isinstance(module, Triplets))


def _watch(method: AdaLoRA, memory: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    """Take a step's |θ·∂L/∂θ| into its running mean and spread."""
    assert parameter.grad is not None
    seen = (parameter.detach() * parameter.grad).abs().to(torch.promote_types(parameter.dtype, torch.float32))
    mean, spread = (memory.get(f"{name}.{kind}", torch.zeros_like(seen)) for kind in ("mean", "spread"))
    memory[f"{name}.mean"] = mean = method.beta1 * mean + (1 - method.beta1) * seen
    memory[f"{name}.spread"] = method.beta2 * spread + (1 - method.beta2) * (seen - mean).abs()


def worth(memory: dict[str, Tensor], name: str, delta: Triplets) -> Tensor:
    """Return what each rank (r,) of a layer is worth: the score of E, and the mean ones of A and B."""
    if f"{name}.values.mean" not in memory:  # it had no gradient, or the first step is the last one
        return torch.zeros(len(delta.values))
    e, a, b = (memory[f"{name}.{n}.mean"] * memory[f"{name}.{n}.spread"] for n in ("values", "down", "up"))
    return e + (a.mean(1) + b.mean(0))


def share_out(method: AdaLoRA, adapter: Adapter, step: Step, last: int) -> None:
    """Set E to 0 but at the ranks worth most of all layers, as many as the budget; note which, at last."""
    layers = list(_triplets(adapter))
    scores = torch.cat([worth(step.memory, name, delta).cpu() for name, delta in layers])
    order = scores.argsort(descending=True, stable=True)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[order[: method.budget(step.number, last, len(layers))]] = True
    if step.number == last:
        step.memory.clear()
    for (name, delta), own in zip(layers, kept.split(method.rank), strict=True):
        own = own.to(delta.values.device)
        delta.values.masked_fill_(~own, 0.0)
        if step.number == last:
            step.memory[f"{name}{KEPT}"] = own
