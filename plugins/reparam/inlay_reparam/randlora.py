"""RandLoRA: a full-rank change as a sum of frozen random low-rank products, scaled by learned diagonals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inlay.authoring import Adapter, Init, LinearDelta, Ref, Site, setting
from inlay_reparam.sharing import ProjectingMethod
from inlay_reparam.sizes import check_rank


class Bases(nn.Module):
    """A (r, min(O, I)) and B (max(O, I), N, r) of standard deviation 1; O, I: the largest of all layers."""

    def __init__(self, init: Init, method: RandLoRA, sites: Sequence[Site]) -> None:
        super().__init__()
        least, most = sorted([max(s.out_features for s in sites), max(s.in_features for s in sites)])
        each = {"sparse": 1 / 6, "very_sparse": 0.5 / math.sqrt(least)}.get(method.bases)
        shapes = {"A": (method.rank, least), "B": (most, -(-least // method.rank), method.rank)}
        for name, shape in shapes.items():
            drawn = torch.empty(shape, device="meta")
            if init.device.type != "meta":
                drawn = torch.empty(shape).uniform_(-1, 1, generator=init.generator)
                drawn = drawn if each is None else (drawn.abs() > 1 - 2 * each) * drawn.sign()
                drawn = drawn / drawn.std()
            self.register_buffer(name, init.tensor(drawn).data, persistent=method.save_projection)


class ScaledBases(LinearDelta):
    """ΔW = s Σ_n B_n diag(Λ_n) A diag(Γ_n), or its transpose: `scales` = Λ (r, N), `gains` = Γ (N, d).

    d is the smaller, D the larger side of the layer. As one product (D, N·r) (N·r, d): column n·r + j of
    B's side meets row j·N + n of A's, which is how huggingface/peft's checkpoints mean it.
    """

    def __init__(self, site: Site, init: Init, shared: Ref, method: RandLoRA) -> None:
        super().__init__()
        rows, columns = site.out_features, site.in_features
        self.least, self.most, self.wide_input = min(rows, columns), max(rows, columns), columns > rows
        self.count = -(-self.least // method.rank)
        self.scales = init.zeros(method.rank, self.count)
        self.gains = init.full(self.count, self.least, value=1 / max(self.count, self.least))
        self.shared, self.scale, self.rate = shared, method.alpha / method.rank, method.dropout

    def parts(self, like: Tensor) -> list[Tensor]:
        """Return B's side (D, N·r), A (r, d), s·Λ and Γ in the dtype of `like`."""
        bases = self.shared.module
        A, B = bases.A[:, : self.least], bases.B[: self.most, : self.count].flatten(1)
        return [t.to(like.dtype) for t in (B, A, self.scale * self.scales, self.gains)]

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in), ΔW not formed."""
        B, *small = self.parts(x)
        if self.wide_input:
            return BySmaller.apply(x @ B, *small, False)  # type: ignore[no-any-return, no-untyped-call]
        return BySmaller.apply(x, *small, True) @ B.T  # type: ignore[no-any-return, no-untyped-call]

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in)."""
        B, *small = self.parts(like)
        dense = B @ scaled(*small)
        return dense.T if self.wide_input else dense


def scaled(A: Tensor, scales: Tensor, gains: Tensor) -> Tensor:
    """Return A's side (r·N, d): row j·N + n is Λ[j, n] A[j] Γ[n]."""
    return (scales[:, :, None] * A[:, None] * gains).flatten(0, 1)


class BySmaller(torch.autograd.Function):
    """x S, or x Sᵀ (`transposed`), with S = scaled(A, Λ, Γ): d² entries, made again for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, scales: Tensor, gains: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, A, scales, gains)
        ctx.transposed = transposed
        side = scaled(A, scales, gains)
        return x @ (side.T if transposed else side)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, scales, gains = ctx.saved_tensors
        grad = grad.to(x.dtype)
        side = scaled(A, scales, gains)
        back = grad @ (side if ctx.transposed else side.T) if ctx.needs_input_grad[0] else None
        one, other = (grad, x) if ctx.transposed else (x, grad)
        outer = (one.flatten(0, -2).T @ other.flatten(0, -2)).view(*scales.shape, -1) * A[:, None]
        by_scale = torch.einsum("jnv,nv->jn", outer, gains)
        return back, None, by_scale, torch.einsum("jnv,jn->nv", outer, scales), None


@dataclass(frozen=True)
class RandLoRA(ProjectingMethod):
    """Many frozen random low-rank products, each scaled by two learned diagonals, add up to full rank.

        ΔW = s Σ_n B_n diag(Λ_n) A diag(Γ_n),   N = ⌈d / r⌉ products,   s = alpha / rank

    d = min(in, out), D = max(in, out); transposed where in > out, so that A lies on the smaller
    side. Frozen B_n (D, r) and one A (r, d), cut from one pair for all layers. Λ (r, N) = 0 and Γ (N, d) =
    1 / max(N, d): starts at the base model. A and B are uniform, "sparse" (±1, each with probability 1/6)
    or "very_sparse" (1 / (2√min(O, I))), over their standard deviation, drawn on the CPU from `key`.

    Parameters: N·(r + d) per layer: fewer with a larger rank. arXiv 2502.00987,
    PaulAlbert31/RandLoRA. As huggingface/peft in s (the authors divide by √N as well) and in which columns
    of B meet which rows of A; differs in the draws, which are saved only with save_projection=True.
    """

    id: ClassVar[str] = "randlora"
    paper: ClassVar[str] = "2502.00987"
    lr: ClassVar[float] = 1e-3

    rank: int = setting(32, least=1)
    alpha: float = setting(640.0, above=0)
    bases: Literal["uniform", "sparse", "very_sparse"] = setting("uniform")

    def common(self, sites: Sequence[Site], adapter: Adapter) -> nn.Module:
        for site in sites:
            check_rank(self, site, min(site.in_features, site.out_features))
        return Bases(adapter.init(shared="common", seed=self.key), self, sites)

    def beside(self, site: Site, adapter: Adapter, common: Ref) -> ScaledBases:
        return ScaledBases(site, adapter.init(site), common, self)
