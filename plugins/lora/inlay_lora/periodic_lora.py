"""PeriodicLoRA: LoRA in stages, each with new factors beside those of the stages before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import Adapter, At, Init, Site, Stage, hookimpl, setting
from inlay_lora.factors import LowRank, LowRankMethod

ENDED = "ended"  # how many stages have ended


class Accumulated(LowRank):
    """Δy = s·(drop(x) Aᵀ) Bᵀ + s·Σᵢ cᵢ (x Aᵢᵀ) Bᵢᵀ: LoRA's factors, and frozen ones of earlier stages.

    `past_down` (R, in) holds the Aᵢ one below another, `past_up` (out, R) the Bᵢ side by side, as
    they were trained; `weights` (R,) the s·cᵢ.
    """

    def __init__(self, site: Site, init: Init, method: PeriodicLoRA) -> None:
        super().__init__(site, init, method)
        self.keep(self.down[:0], self.up[:, :0], self.down.new_empty(0))

    def keep(self, down: Tensor, up: Tensor, kept: Tensor) -> None:
        """Let these be the frozen factors, `kept` (J,) the cᵢ of the J stages they are from."""
        weights = self.scale * kept.repeat_interleave(len(self.down))
        self.register_buffer("past_down", down.detach().clone())
        self.register_buffer("past_up", up.detach().clone())
        self.register_buffer("weights", weights.to(down), persistent=False)

    def effect(self, x: Tensor, at: At | None = None) -> Tensor:
        """Return the change (*, out) that all factors make of x (*, in)."""
        return super().effect(x) + self.past(x)

    def past(self, x: Tensor) -> Tensor:
        """Return the change (*, out) that the frozen factors make of x (*, in)."""
        inner = F.linear(x, self.past_down.to(x.dtype)) * self.weights.to(x.dtype)
        return F.linear(inner, self.past_up.to(x.dtype))

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of x (*, in); what is frozen reads x as the base does."""
        now = super().effect(self.dropped(x))
        return self.completed(now + self.past(x) if len(self.weights) else now, x, x, at)

    def product(self, like: Tensor) -> Tensor:
        """Return the sum of all changes (out, in) in the dtype of `like`."""
        past = self.past_up.to(like.dtype) * self.weights.to(like.dtype)
        return super().product(like) + past @ self.past_down.to(like.dtype)


@dataclass(frozen=True)
class PeriodicLoRA(LowRankMethod):
    """LoRA in stages: at the end of each its change is kept, frozen, and new factors start.

        y = x Wᵀ + b + s·B A x + s·Σᵢ cᵢ Bᵢ Aᵢ x      A (r, in) drawn anew in each stage, B (out, r) = 0

    After J stages cᵢ = 1 − m^(J−i+1) for the i-th: with U_j = m·U_{j−1} + (1 − m)·s·B_j A_j unloaded at
    each end, that is Σ U_j. With momentum m = 0 all are 1, and an end changes no output. The last
    of the `stages` goes on in its own factors. Each stage needs a new optimizer, and wants its own
    schedule: `inlay.advance` ends one, `inlay_train.Trainer` does both.

    Parameters: r·(in + out) per layer that learn, as many again in the file for each stage that
    ended; rank up to stages·r. arXiv 2402.16141; no code by its authors. Differs: earlier changes are
    factors of the adapter, not additions to the base, so no bit of a base is touched or lost in few
    bits, and a file resumes in the middle; the rule for m is the catalogue's reading of the paper.
    """

    id: ClassVar[str] = "periodic_lora"
    paper: ClassVar[str] = "2402.16141"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    lr: ClassVar[float] = 2e-3
    keeps_start: ClassVar[bool] = False

    n_stages: int = setting(4, least=1)
    stage_steps: int | None = setting(None, least=1)
    momentum: float = setting(0.0, least=0, below=1)

    def delta(self, site: Site, init: Init) -> Accumulated:
        return Accumulated(site, init, self)

    def kept(self, ended: int) -> Tensor:
        """Return the cᵢ (ended,) of the stages that ended."""
        return 1 - self.momentum ** torch.arange(ended, 0, -1, dtype=torch.float64)

    @staticmethod
    @hookimpl
    def inject(method: PeriodicLoRA, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        ended = adapter.data.get(ENDED, 0)
        LowRankMethod.inject(method, sites, adapter)
        for _, delta in adapter.placed if ended else ():
            delta.keep(delta.down.repeat(ended, 1), delta.up.repeat(1, ended), method.kept(ended))
        return len(sites)

    @staticmethod
    @hookimpl
    def stages(method: PeriodicLoRA, adapter: Adapter) -> list[Stage]:
        left, steps = range(adapter.data.get(ENDED, 0) + 1, method.n_stages), method.stage_steps
        ending = [Stage(f"stage {number}", steps, partial(unload, method)) for number in left]
        return [*ending, Stage(f"stage {method.n_stages}", steps)]


def unload(method: PeriodicLoRA, adapter: Adapter) -> None:
    """End a stage: freeze its factors beside the earlier ones, and let new ones start."""
    ended = adapter.data[ENDED] = adapter.data.get(ENDED, 0) + 1
    for site, delta in adapter.placed:
        assert isinstance(delta, Accumulated)
        down, up = delta.down.detach(), delta.up.detach()
        past = torch.cat([delta.past_down, down]), torch.cat([delta.past_up, up], 1)
        delta.keep(*past, method.kept(ended))
        init = adapter.init(shared=f"{site.name}/{ended}", like=down)
        delta.down, delta.up = init.kaiming_uniform(*down.shape), init.zeros(*up.shape)
