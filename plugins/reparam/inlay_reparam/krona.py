"""KronA: a Kronecker product beside a weight, or beside the whole feed-forward sublayer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inlay.authoring import At, ConfigError, Init, LinearDelta, Method, Site, setting
from inlay_reparam.kron import factorization, kron_linear
from inlay_reparam.sizes import divisors, shown


@dataclass(frozen=True)
class KroneckerMethod(Method):
    """Settings of s·(P ⊗ Q): `shape` (a1, a2) is P's, and a1·b1 = out, a2·b2 = in give Q's (b1, b2)."""

    shape: tuple[int, ...] | None = setting(None, least=1)
    scale: float = setting(16.0, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape is not None and len(self.shape) != 2:
            raise ConfigError(
                f"{self.id}: the shape of P is a pair",
                saw=f"shape={self.shape}",
                do="give (a1, a2), as (32, 24)",
            )

    def shape_at(self, site: Site) -> tuple[int, int]:
        """Return (a1, a2) at a site: as given, or the squarest, the larger part of out in P."""
        if self.shape is None:
            return factorization(site.out_features)[1], factorization(site.in_features)[0]
        a1, a2 = self.shape
        if site.out_features % a1 or site.in_features % a2:
            rows, columns = (", ".join(map(str, divisors(n))) for n in (site.out_features, site.in_features))
            raise ConfigError(
                f"{self.id}: the shape of P does not divide the layer's sizes",
                saw=f"shape={self.shape}; {shown(site)}",
                do=f"take a1 among {rows} and a2 among {columns}; or other targets",
            )
        return a1, a2


class Kronecker(LinearDelta):
    """ΔW = s·(P ⊗ Q): `left` = P (a1, a2) Kaiming-uniform (a=√5), `right` = Q (b1, b2) = 0."""

    def __init__(self, site: Site, init: Init, method: KroneckerMethod) -> None:
        super().__init__()
        a1, a2 = method.shape_at(site)
        self.left = init.kaiming_uniform(a1, a2)
        self.right = init.zeros(site.out_features // a1, site.in_features // a2)
        self.scale = method.scale

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in); P ⊗ Q is never formed."""
        return kron_linear(x, self.scale * self.left.to(x.dtype), self.right.to(x.dtype))

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in) in the dtype of `like`."""
        return self.scale * torch.kron(self.left.to(like.dtype), self.right.to(like.dtype))


@dataclass(frozen=True)
class ParallelMethod(KroneckerMethod):
    """The same beside a sublayer, with a bias if `bias`."""

    accepts: ClassVar[frozenset[str]] = frozenset({"sublayer"})

    bias: bool = setting(False)


class ParallelKronecker(Kronecker):
    """Δy = s·(P ⊗ Q) x [+ bias] [+ skip·x], x (B, T, d) what the sublayer reads."""

    def __init__(self, site: Site, init: Init, method: ParallelMethod, skip: float | None = None) -> None:
        super().__init__(site, init, method)
        self.bias = init.zeros(site.out_features) if method.bias else None
        self.skip = None if skip is None else init.full(1, value=skip)

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (B, T, d) of x (B, T, d)."""
        change = self.effect(x)
        change = change if self.bias is None else change + self.bias
        return change if self.skip is None else change + self.skip * x

    @property
    def folds(self) -> bool:
        return False

    def why_not(self) -> str:
        return "a product from a whole sublayer's input to its output is no change of one layer's weights"


@dataclass(frozen=True)
class KronA(KroneckerMethod):
    """A Kronecker product beside a frozen weight.

        y = x Wᵀ + b + s·x (P ⊗ Q)ᵀ,   P (a1, a2), Q (b1, b2),   a1·b1 = out, a2·b2 = in

    P Kaiming-uniform (a=√5), Q = 0; `scale` = s is fixed, 16 as the paper tunes it. Without `shape`
    (a1, a2), a1 is the larger part of the squarest a1·b1 = out and a2 the smaller of a2·b2 = in. The
    rank of P ⊗ Q is the product of theirs. It is applied as P X Qᵀ to x as a matrix X (a2, b2).

    Parameters: a1·a2 + b1·b2 per layer. arXiv 2212.10650, which has no code: which of the two starts
    at 0 is this package's choice.
    """

    id: ClassVar[str] = "krona"
    paper: ClassVar[str] = "2212.10650"
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    lr: ClassVar[float] = 5e-4  # with s = 16 a step moves the weight far

    def delta(self, site: Site, init: Init) -> Kronecker:
        return Kronecker(site, init, self)


@dataclass(frozen=True)
class KronAB(ParallelMethod):
    """A Kronecker product from the feed-forward sublayer's input to its output, before the residual.

        h = FFN(x) + s·(P ⊗ Q) x [+ b],   P (a1, a2), Q (b1, b2),   a1·b1 = a2·b2 = d

    x is what the sublayer's first linear layer reads. Neither bottleneck nor activation; P
    Kaiming-uniform (a=√5), Q = 0, b = 0 if `bias`. `shape` and `scale` as KronA's. It stays beside
    the sublayer: no weight can hold it.

    Parameters: a1·a2 + b1·b2, + d with a bias, per sublayer. arXiv 2212.10650.
    """

    id: ClassVar[str] = "krona_b"
    paper: ClassVar[str] = "2212.10650"
    default_targets: ClassVar[tuple[str, ...]] = ("ffn",)
    lr: ClassVar[float] = 1e-3

    def delta(self, site: Site, init: Init) -> ParallelKronecker:
        return ParallelKronecker(site, init, self)


@dataclass(frozen=True)
class KronABRes(ParallelMethod):
    """KronA_B with a scaled copy of its input.

        h = FFN(x) + s·(P ⊗ Q) x + s_res·x [+ b],   s_res (1,) learned

    s_res starts at `residual`: 0 starts at the base model, 1 as a re-implementation has it.

    Parameters: a1·a2 + b1·b2 + 1, + d with a bias, per sublayer. arXiv 2212.10650.
    """

    id: ClassVar[str] = "krona_b_res"
    paper: ClassVar[str] = "2212.10650"
    default_targets: ClassVar[tuple[str, ...]] = ("ffn",)
    lr: ClassVar[float] = 1e-3

    residual: float = setting(0.0)

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        return self.residual == 0

    def delta(self, site: Site, init: Init) -> ParallelKronecker:
        return ParallelKronecker(site, init, self, self.residual)
