"""AdaLoRA: a budget of ranks, shared out among layers by what each rank is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inlay.authoring import Adapter, ConfigError, Init, Site, Step, hookimpl, setting
from inlay_lora_rank.ranked import Ranked, RankedMethod

KEPT = "kept"  # which ranks the last sharing out left, layer by layer


class Triplets(Ranked):
    """Δy = s·((drop(x) Aᵀ) ⊙ E) Bᵀ: `values` = E (r,); a rank whose value is 0 is out."""

    def __init__(self, site: Site, init: Init, method: AdaLoRA) -> None:
        down = init.normal(method.rank, site.in_features, std=0.02)
        super().__init__(down, init.normal(site.out_features, method.rank, std=0.02), method.dropout)
        self.values, self.scale = init.zeros(method.rank), method.alpha / (method.rank + 1e-5)

    def weights(self) -> Tensor:
        return self.scale * self.values


@dataclass(frozen=True)
class AdaLoRA(RankedMethod):
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
    default_targets: ClassVar[tuple[str, ...]] = ("linear",)
    made: ClassVar[type[Ranked]] = Triplets
    lr: ClassVar[float] = 5e-3

    rank: int = setting(12, least=1)
    target_rank: int = setting(8, least=1)
    t_init: int = setting(0, least=0)
    t_final: int = setting(0, least=0)
    every: int = setting(1, least=1)
    beta1: float = setting(0.85, above=0, below=1)
    beta2: float = setting(0.85, above=0, below=1)
    orthogonality: float = setting(0.5, least=0)

    def last(self, step: Step) -> int:
        """Return the step at which the budget is the last one; raise if it could not fall until then."""
        last = (step.total or 0) - self.t_final
        if last <= self.t_init or self.target_rank > self.rank:
            raise ConfigError(
                "adalora: the budget of ranks cannot fall in this training",
                saw=f"steps={step.total}, t_init={self.t_init}, t_final={self.t_final}, "
                f"rank={self.rank}, target_rank={self.target_rank}",
                do="inlay.lifecycle(model, optimizer, steps=...), with more steps than t_init + t_final",
            )
        return last

    def budget(self, step: int, last: int, layers: int) -> int:
        """Return how many ranks the layers have together after a step, `last` the one of the last budget."""
        left = 1 - (step - self.t_init) / (last - self.t_init)
        return int((self.rank - self.target_rank) * layers * left**3 + self.target_rank * layers)

    @staticmethod
    @hookimpl
    def auxiliary_loss(method: AdaLoRA, adapter: Adapter) -> Tensor | None:
        grams = [gram for _, d in adapter.placed for gram in (d.down @ d.down.T, d.up.T @ d.up)]
        off = [(gram.float() - torch.eye(len(gram), device=gram.device)).norm() for gram in grams]
        return method.orthogonality * torch.stack([norm.to(off[0].device) for norm in off]).mean()

    @staticmethod
    @hookimpl
    def before_step(method: AdaLoRA, adapter: Adapter, step: Step) -> None:
        method.last(step)  # a schedule that cannot be is refused before training

    @staticmethod
    @hookimpl
    def after_step(method: AdaLoRA, adapter: Adapter, step: Step) -> None:
        now, last, learned = step.number, method.last(step), list(adapter.named_parameters())
        if any(parameter.grad is None for _, parameter in learned):  # another adapter is in use
            return
        for name, parameter in learned if now < last or now == 1 else ():
            watch(method, step.memory, name, parameter)
        if now == last or (method.t_init < now < last and now % method.every == 0):
            kept = best(step.memory, adapter, method.budget(now, last, len(adapter.placed)))
            if now == last:
                step.memory.clear()
            step.memory[KEPT] = kept
        elif now < last:
            return
        for (_, delta), own in zip(adapter.placed, step.memory[KEPT].split(method.rank)):
            delta.values.masked_fill_(~own.to(delta.values.device), 0.0)


def watch(method: AdaLoRA, memory: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    """Take a step's |θ·∂L/∂θ| into its running mean and spread."""
    seen = (parameter * parameter.grad).abs().to(torch.promote_types(parameter.dtype, torch.float32))
    mean, spread = (memory.get(f"{name}.{kind}", torch.zeros_like(seen)) for kind in ("mean", "spread"))
    memory[f"{name}.mean"] = mean = method.beta1 * mean + (1 - method.beta1) * seen
    memory[f"{name}.spread"] = method.beta2 * spread + (1 - method.beta2) * (seen - mean).abs()


def best(memory: dict[str, Tensor], adapter: Adapter, budget: int) -> Tensor:
    """Return which ranks of all layers are worth most: the score of E, and the mean ones of A and B."""
    s = {n: memory[f"{n}.mean"] * memory[f"{n}.spread"] for n, _ in adapter.named_parameters()}
    worth = [s[f"{n}.values"] + (s[f"{n}.down"].mean(1) + s[f"{n}.up"].mean(0)) for n, _ in adapter.modules()]
    order = torch.cat([each.cpu() for each in worth]).argsort(descending=True, stable=True)
    return torch.zeros(len(order), dtype=torch.bool).index_fill(0, order[:budget], True)
