"""DyLoRA: LoRA trained for every rank at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.attach import refused_while_merged
from inlay.authoring import Adapter, ConfigError, Init, Site, Step, hookimpl, setting
from inlay.errors import shown
from inlay.stack import need_state
from inlay_lora_rank.ranked import Ranked, RankedMethod

RANK = "rank"  # the rank in use outside training, where it was set


class Prefixed(Ranked):
    """Δy = (alpha / b)·(drop(x) A[:b]ᵀ) B[:, :b]ᵀ: in training b is the step's, else the chosen one.

    `drawn` and `chosen` (r,) are the c of these, `learns` (r,) says which ranks learn in the step. Being
    tensors, they let a compiled model run for every b.
    """

    def __init__(self, site: Site, init: Init, method: DyLoRA) -> None:
        down = init.kaiming_uniform(method.rank, site.in_features)
        super().__init__(down, init.zeros(site.out_features, method.rank), method.dropout)
        self.frozen, self.alpha = method.frozen, method.alpha
        for name in ("drawn", "chosen"):
            self.register_buffer(name, init.zeros(method.rank).detach(), persistent=False)
        self.register_buffer("learns", torch.ones_like(self.drawn, dtype=torch.bool), persistent=False)
        self.draw(method.rank)

    def weigh(self, c: Tensor, rank: int) -> None:
        """Let c be that of the first `rank` ranks."""
        c.zero_()[:rank] = self.alpha / rank

    def draw(self, rank: int) -> None:
        """Let the first `rank` ranks act in training; with `frozen` only the last of them learns."""
        self.weigh(self.drawn, rank)
        self.learns.zero_()[rank - 1 if self.frozen else 0 : rank] = True

    def weights(self) -> Tensor:
        return self.chosen

    def masked(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return A and B, each beside a mask of what learns in it."""
        return (self.down, self.learns[:, None]), (self.up, self.learns)

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out), in training at the step's rank, without gradient for what does not learn."""
        if not self.training:
            return super().effect(x)
        down, up = (torch.where(m, f, f.detach()) if self.frozen else f for f, m in self.masked())
        return self.applied(x, down, self.drawn, up)

    def hold(self) -> None:
        """Note the factors before the optimizer changes them."""
        self.held = [factor.detach().clone() for factor, _ in self.masked()]

    def release(self) -> None:
        """Put back what does not learn in this step: momentum and decay moved it too."""
        for (factor, learns), held in zip(self.masked(), self.held):
            factor.copy_(torch.where(learns, factor, held))
        del self.held


@dataclass(frozen=True)
class DyLoRA(RankedMethod):
    """LoRA for every rank up to r at once: each step draws a rank b, the same for all layers.

        y = x Wᵀ + bias + (alpha / b)·(drop(x) A[:b]ᵀ) B[:, :b]ᵀ,   A (r, in), B (out, r) = 0

    b is uniform in 1..r, drawn by `inlay.lifecycle` once per optimizer step. With `frozen` ranks
    1 … b − 1 act and rank b alone learns, else all b do; what does not learn in a step is not moved
    in it. Outside training b is `eval_rank` (default: r) or that of `set_rank`; each is a model that
    works, and merges. A is Kaiming-uniform (a=√5).

    Parameters: r·(in + out) per layer. arXiv 2210.07558, huawei-noah/Efficient-NLP. Differs: the
    reference lets AdamW's momentum and decay move every rank in every step; the paper does not.
    """

    id: ClassVar[str] = "dylora"
    paper: ClassVar[str] = "2210.07558"
    made: ClassVar[type[Ranked]] = Prefixed
    lr: ClassVar[float] = 5e-3

    alpha: float = setting(16.0, above=0)
    frozen: bool = setting(True)
    eval_rank: int | None = setting(None, least=1)

    def checked(self, rank: Any) -> int:
        """Return a rank to use outside training if it is one."""
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= self.rank:
            raise ConfigError(
                "dylora: there is no such rank to use outside training",
                saw=f"{shown(rank)}, and rank={self.rank}",
                do=f"choose one from 1 to {self.rank}",
            )
        return rank

    @staticmethod
    @hookimpl
    def inject(method: DyLoRA, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        rank = method.checked(adapter.data.get(RANK, method.eval_rank or method.rank))
        for site in sites:
            delta = adapter.place(site, method.delta(site, adapter.init(site)))
            delta.weigh(delta.chosen, rank)
        return len(sites)

    @staticmethod
    @hookimpl
    def before_step(method: DyLoRA, adapter: Adapter, step: Step) -> None:
        rank = int(torch.randint(1, method.rank + 1, (), generator=step.generator()))
        for _, delta in adapter.placed:
            delta.draw(rank)

    @staticmethod
    @hookimpl
    def after_backward(method: DyLoRA, adapter: Adapter, step: Step) -> None:
        for _, delta in adapter.placed:
            delta.hold()

    @staticmethod
    @hookimpl
    def after_step(method: DyLoRA, adapter: Adapter, step: Step) -> None:
        for _, delta in adapter.placed:
            delta.release()


@torch.no_grad()
def set_rank(model: nn.Module, rank: int, name: str = "default") -> None:
    """Use the first `rank` ranks of the DyLoRA adapter or part `name` outside training; saved with it.

    Raises `ConfigError` for a rank it has not or where there is no DyLoRA, `MergedError` while merged.
    """
    state = need_state(model)
    found = [placed for placed in state.find(name) if isinstance(placed.method, DyLoRA)]
    if not found:
        raise ConfigError(
            "only a DyLoRA can be used at another rank than its own",
            saw=f"{name!r}, made of {', '.join(p.method.id for p in state.find(name))}",
            do="name an adapter or part of DyLoRA; inlay.to_lora writes any change at a lower rank",
        )
    if any(placed.merged for placed in found):
        raise refused_while_merged(state, "set_rank")
    for placed in found:
        placed.method.checked(rank)  # type: ignore[attr-defined]
    for placed in found:
        placed.adapter.data[RANK] = rank
        for _, delta in placed.adapter.placed:
            delta.weigh(delta.chosen, rank)  # type: ignore[operator]
