"""LoRA as what core writes low-rank changes as: `inlay.to_lora`, and combinations of a rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from inlay.authoring import Delta
from inlay_lora.lora import LoRA


class Holder:
    """Makes a LoRA of given ranks and fills its deltas. Offered under the entry point `inlay.low_rank`."""

    def method(self, ranks: Mapping[str, int], *, biased: bool) -> LoRA:
        """Return a LoRA of these ranks by site name, with s = 1."""
        alphas = {name: float(rank) for name, rank in ranks.items()}
        bias = "own" if biased else "none"
        return LoRA(rank=dict(ranks), alpha=alphas, targets=tuple(ranks), bias=bias)

    @torch.no_grad()
    def fill(self, delta: Delta, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        """Let a delta change its layer's weight by up·down, (out, r) (r, …), and its bias."""
        held_down, held_up, used = delta.get_parameter("down"), delta.get_parameter("up"), len(down)
        held_down.zero_()[:used].copy_(down.view(used, *held_down.shape[1:]))
        held_up.zero_()[:, :used].copy_(up)
        if bias is not None:
            delta.get_parameter("bias").copy_(bias)
