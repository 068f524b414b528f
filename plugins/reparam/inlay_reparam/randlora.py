"""RandLoRA: a full-rank change as a sum of frozen random low-rank products, scaled by learned diagonals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inlay.authoring import Adapter, ConfigError, Init, LinearDelta, Method, Ref, Site, hookimpl, setting


class Bases(nn.Module):
    """A (r, min(O, I)) and B (max(O, I), N, r) of standard deviation 1; O, I: the largest of all layers."""

    def __init__(self, init: Init, method: RandLoRA, sites: Sequence[Site]) -> None:
        super().__init__()
        sizes = max(s.out_features for s in sites), max(s.in_features for s in sites)
        least, most = min(sizes), max(sizes)
        shapes = {"A": (method.rank, least), "B": (most, -(-least // method.rank), method.rank)}
        chance = {"uniform": 1.0, "sparse": 1 / 6, "very_sparse": 0.5 / math.sqrt(least)}[method.bases]
        for name, shape in shapes.items():
            drawn = torch.empty(shape, device="meta" if init.device.type == "meta" else "cpu")
            drawn.uniform_(-1, 1, generator=None if drawn.is_meta else init.generator)
            if method.bases != "uniform":
                drawn = (drawn > 1 - 2 * chance).float() - (drawn < 2 * chance - 1).float()
            drawn = drawn if drawn.is_meta else drawn / drawn.std()
            self.register_buffer(name, drawn.to(init.device, init.dtype), persistent=method.save_projection)


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
        self.shared, self.scale, self.rate = shared, method.scale, method.dropout

    def parts(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return A (r, d), B's side (D, N·r), s·Λ and Γ in the dtype of `like`."""
        bases = self.shared.module
        A, B = bases.A[:, : self.least], bases.B[: self.most, : self.count].flatten(1)
        return (
            A.to(like.dtype),
            B.to(like.dtype),
            self.scale * self.scales.to(like.dtype),
            self.gains.to(like.dtype),
        )

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in), ΔW not formed."""
        A, B, scales, gains = self.parts(x)
        if self.wide_input:
            return BySmaller.apply(x @ B, A, scales, gains, False)  # type: ignore[no-any-return, no-untyped-call]
        return BySmaller.apply(x, A, scales, gains, True) @ B.T  # type: ignore[no-any-return, no-untyped-call]

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in)."""
        A, B, scales, gains = self.parts(like)
        dense = B @ scaled(A, scales, gains)
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
        outer = one.flatten(0, -2).T @ other.flatten(0, -2)
        outer = outer.view(*scales.shape, -1) * A[:, None]
        return (
            back,
            None,
            torch.einsum("jnv,nv->jn", outer, gains),
            torch.einsum("jnv,jn->nv", outer, scales),
            None,
        )


@dataclass(frozen=True)
class RandLoRA(Method):
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
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    lr: ClassVar[float] = 1e-3

    rank: int = setting(32, least=1)
    alpha: float = setting(640.0, above=0)
    dropout: float = setting(0.0, least=0, below=1)
    bases: Literal["uniform", "sparse", "very_sparse"] = setting("uniform")
    key: int = setting(0, least=0)
    save_projection: bool = setting(False)

    @property
    def scale(self) -> float:
        """The factor s in front of the sum."""
        return self.alpha / self.rank

    @staticmethod
    @hookimpl
    def inject(method: RandLoRA, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        for site in sites:
            least = min(site.in_features, site.out_features)
            if method.rank > least:
                raise ConfigError(
                    "the rank of RandLoRA is larger than the layer",
                    saw=f"rank={method.rank}; {site.name} is ({site.out_features}, {site.in_features})",
                    do=f"give a rank of at most {least}",
                )
        init = adapter.init(shared="bases", seed=method.key)
        shared = adapter.share("bases", Bases(init, method, sites))
        for site in sites:
            adapter.place(site, ScaledBases(site, adapter.init(site), shared, method))
        return len(sites)
