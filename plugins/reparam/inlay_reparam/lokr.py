"""LoKr: a Kronecker product whose larger factor is of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.authoring import ConfigError, Init, Site, setting
from inlay_reparam.kron import factorization, kron_linear
from inlay_reparam.rebuilt import Rebuilt, RebuiltMethod, shape_of


class LowRankKronecker(Rebuilt):
    """ΔW = s·(w1 ⊗ w2), each factor a matrix of its own or the product of `_up` and `_down`.

    w1 (l, m), w2 (k, n, *kernel); out = l·k, in = m·n. `w2_core` (r, r, *kernel) is the effective form.
    """

    def __init__(self, site: Site, init: Init, method: LoKr) -> None:
        super().__init__(method)
        rows, columns, *kernel = shape_of(site)
        (l, k), (m, n) = (factorization(size, method.decompose_factor) for size in (rows, columns))
        r, first = method.rank, method.zero == "w1"
        self.inner = (k, n, *kernel)
        self.w1 = self.w1_up = self.w1_down = self.w2 = self.w2_up = self.w2_down = self.w2_core = None
        if method.decompose_both and r < max(l, m) / 2:
            self.w1_up = init.zeros(l, r) if first else init.kaiming_uniform(l, r)
            self.w1_down = init.kaiming_uniform(r, m)
        else:
            self.w1 = init.zeros(l, m) if first else init.kaiming_uniform(l, m)
        if r >= max(k, n) / 2:
            self.w2 = init.kaiming_uniform(*self.inner) if first else init.zeros(*self.inner)
            return
        effective = method.effective_conv and math.prod(kernel) > 1
        down = (r, n) if effective else (r, n * math.prod(kernel))
        self.w2_up = init.kaiming_uniform(r, k) if effective else init.kaiming_uniform(k, r)
        self.w2_down = init.kaiming_uniform(*down) if first else init.zeros(*down)
        if effective:
            self.w2_core = init.kaiming_uniform(r, r, *kernel)

    def first(self, like: Tensor) -> Tensor:
        """Return s·w1 (l, m)."""
        return self.scale * product(self.w1, self.w1_up, self.w1_down, like)

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in): neither ΔW nor w2 is formed."""
        if self.w2 is not None:
            return kron_linear(x, self.first(x), self.w2.to(x.dtype))
        assert self.w2_up is not None
        assert self.w2_down is not None
        return kron_linear(x, self.first(x), self.w2_down.to(x.dtype), self.w2_up.to(x.dtype))

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW, shaped like the layer's weight, in the dtype of `like`."""
        if self.w2_core is None:
            second = product(self.w2, self.w2_up, self.w2_down, like).view(self.inner)
        else:
            parts = (t.to(like.dtype) for t in (self.w2_core, self.w2_down, self.w2_up))
            second = torch.einsum("ij...,jn,ik->kn...", *parts).contiguous()
        first = self.first(like)
        return torch.kron(first.view(*first.shape, *(1,) * (second.dim() - 2)), second)


def product(
    whole: nn.Parameter | None, up: nn.Parameter | None, down: nn.Parameter | None, like: Tensor
) -> Tensor:
    """Return a factor in the dtype of `like`: itself, or up·down."""
    if whole is not None:
        return whole.to(like.dtype)
    assert up is not None
    assert down is not None
    return up.to(like.dtype) @ down.to(like.dtype)


@dataclass(frozen=True)
class LoKr(RebuiltMethod):
    """A Kronecker product of a small and a large factor, the large one of low rank.

        W' = W + s·(w1 ⊗ w2),   w1 (l, m), w2 = w2_up (k, r) · w2_down (r, n),   out = l·k, in = m·n

    s = alpha / rank. l ≤ k and m ≤ n are as near to each other as the sizes allow, or l = m =
    `decompose_factor`. w2 is a matrix of its own where rank ≥ max(k, n)/2; w1 is a product too with
    `decompose_both`, where rank < max(l, m)/2. w1 (or w1_up) = 0, the rest Kaiming-uniform (a=√5);
    zero="w2" is LyCORIS's start: w2 (or w2_down) = 0 instead. Convolutions: w2 (k, n, *kernel), as
    w2_up (k, r) · w2_down (r, n·|kernel|); with `effective_conv` Σ core_ij w2_up_i w2_down_j.

    Parameters: l·m + r·(k + n) per linear layer (the usual case). arXiv 2309.14859, LyCORIS and
    huggingface/peft. Differs: ΔW is not formed in the forward; Conv1D layers and slices of fused ones
    too; what `rank_dropout` keeps is divided by 1 − p, not by the kept fraction, unless
    rank_dropout_scale=False. Left out: the weight decomposition, which is DoRA's.
    """

    id: ClassVar[str] = "lokr"
    paper: ClassVar[str] = "2309.14859"
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    lr: ClassVar[float] = 1e-2

    decompose_both: bool = setting(False)
    decompose_factor: int = setting(-1, least=-1)
    zero: Literal["w1", "w2"] = setting("w1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor == 0:
            raise ConfigError(
                "lokr: nothing can be decomposed by 0",
                saw="decompose_factor=0",
                do="give -1 for the squarest factors, or the size of w1",
            )

    def delta(self, site: Site, init: Init) -> LowRankKronecker:
        return LowRankKronecker(site, init, self)
