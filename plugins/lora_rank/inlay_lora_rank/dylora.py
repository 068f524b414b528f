"""DyLoRA: LoRA trained for every rank at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.attach import refused_while_merged
from inlay.authoring import Adapter, ConfigError, Init, Method, Site, Step, hookimpl, setting
from inlay.errors import shown
from inlay.stack import need_state
from inlay_lora_rank.ranked import Ranked, check_rank

RANK = "rank"  # the rank in use outside training, where it was set


class Prefixed(Ranked):
    """Δy = (alpha / b)·(drop(x) A[:b]ᵀ) B[:, :b]ᵀ: in training b is the step's, else the chosen one.

    Which ranks act and which learn is kept in tensors: a compiled model runs for every b.
    """

    drawn: Tensor
    chosen: Tensor
    learns: Tensor

    def __init__(self, site: Site, init: Init, method: DyLoRA, rank: int) -> None:
        super().__init__()
        check_rank(method.id, method.rank, site)
        self.down = init.kaiming_uniform(method.rank, site.in_features)
        self.up = init.zeros(site.out_features, method.rank)
        self.alpha, self.rate, self.frozen = method.alpha, method.dropout, method.frozen
        for name in ("drawn", "chosen"):  # c in training, and elsewhere
            self.register_buffer(name, init.zeros(method.rank).detach(), persistent=False)
        self.register_buffer("learns", torch.ones_like(self.drawn, dtype=torch.bool), persistent=False)
        self._held: tuple[Tensor, Tensor] | None = None
        self.choose(rank)
        self.draw(method.rank)

    def draw(self, rank: int) -> None:
        """Let the first `rank` ranks act in training; with `frozen` only the last of them learns."""
        self._weigh(self.drawn, rank)
        self.learns.fill_(False)
        self.learns[rank - 1 if self.frozen else 0 : rank] = True

    def choose(self, rank: int) -> None:
        """Let the first `rank` ranks act outside training."""
        self._weigh(self.chosen, rank)

    def _weigh(self, c: Tensor, rank: int) -> None:
        c.zero_()
        c[:rank] = self.alpha / rank

    def weights(self) -> Tensor:
        return self.drawn if self.training else self.chosen

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r), in training without gradient at the ranks that do not learn."""
        if not (self.training and self.frozen):
            return self.down, self.up
        return (
            torch.where(self.learns[:, None], self.down, self.down.detach()),
            torch.where(self.learns, self.up, self.up.detach()),
        )

    def hold(self) -> None:
        """Note the factors before the optimizer changes them."""
        self._held = self.down.detach().clone(), self.up.detach().clone()

    def release(self) -> None:
        """Put back the ranks that do not learn in this step: momentum and decay moved them too."""
        assert self._held is not None
        down, up = self._held
        self.down.copy_(torch.where(self.learns[:, None], self.down, down))
        self.up.copy_(torch.where(self.learns, self.up, up))
        self._held = None


@dataclass(frozen=True)
class DyLoRA(Method):
    """LoRA for every rank up to r at once: each step draws a rank b, the same for all layers.

        y = x Wᵀ + bias + (alpha / b)·(drop(x) A[:b]ᵀ) B[:, :b]ᵀ,   A (r, in), B (out, r) = 0

    b is uniform in min_rank..rank, drawn by `inlay.lifecycle`, once per optimizer step. With `frozen`
    ranks 1 … b − 1 act and rank b alone learns, else all b do; what does not learn in a step is not
    moved in it. Outside training b is `eval_rank` (default: r) or that of `set_rank`; each is a model
    that works, and merges.

    Parameters: r·(in + out) per layer. arXiv 2210.07558, huawei-noah/Efficient-NLP. Differs: the
    reference lets AdamW's momentum and decay move every rank in every step; the paper does not.
    """

    id: ClassVar[str] = "dylora"
    paper: ClassVar[str] = "2210.07558"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    lr: ClassVar[float] = 5e-3

    rank: int = setting(8, least=1)
    alpha: float = setting(16.0, above=0)
    dropout: float = setting(0.0, least=0, below=1)
    frozen: bool = setting(True)
    min_rank: int = setting(1, least=1)
    eval_rank: int | None = setting(None, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_rank > self.rank:
            raise ConfigError(
                "dylora: no rank could be drawn",
                saw=f"min_rank={self.min_rank}, rank={self.rank}",
                do="give a min_rank that is at most the rank",
            )
        self.checked(self.eval_rank or self.rank)

    def checked(self, rank: Any) -> int:
        """Return a rank to use outside training if it is one."""
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= self.rank:
            raise ConfigError(
                "dylora: this adapter has no such rank",
                saw=f"{shown(rank)}, trained for ranks {self.min_rank} to {self.rank}",
                do=f"choose one from 1 to {self.rank}",
            )
        return rank

    @staticmethod
    @hookimpl
    def inject(method: DyLoRA, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        rank = method.checked(adapter.data.get(RANK, method.eval_rank or method.rank))
        for site in sites:
            adapter.place(site, Prefixed(site, adapter.init(site), method, rank))
        return len(sites)

    @staticmethod
    @hookimpl
    def before_step(method: DyLoRA, adapter: Adapter, step: Step) -> None:
        among = (method.min_rank, method.rank + 1)
        rank = int(torch.randint(*among, (), generator=step.generator()))
        for delta in _prefixed(adapter):
            delta.draw(rank)

    @staticmethod
    @hookimpl
    def after_backward(method: DyLoRA, adapter: Adapter, step: Step) -> None:
        for delta in _prefixed(adapter):
            delta.hold()

    @staticmethod
    @hookimpl
    def after_step(method: DyLoRA, adapter: Adapter, step: Step) -> None:
        for delta in _prefixed(adapter):
            delta.release()


def _prefixed(adapter: Adapter) -> list[Prefixed]:
    return [delta for _, delta in adapter.placed if isinstance(delta, Prefixed)]


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
            saw=f"{name!r} of {', '.join(p.method.id for p in state.find(name))}",
            do="name an adapter or part of DyLoRA; inlay.to_lora writes any change at a lower rank",
        )
    if any(placed.merged for placed in found):
        raise refused_while_merged(state, "set_rank")
    for placed in found:
        placed.method.checked(rank)  # type: ignore[attr-defined]
    for placed in found:
        placed.adapter.data[RANK] = rank
        for delta in _prefixed(placed.adapter):
            delta.choose(rank)
