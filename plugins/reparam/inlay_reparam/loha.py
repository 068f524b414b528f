"""LoHa: the element-wise product of two low-rank changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import Init, Site, setting
from inlay_reparam.rebuilt import Rebuilt, RebuiltMethod, shape_of
from inlay_reparam.sizes import check_rank


class HadamardProduct(Rebuilt):
    """ΔW = s·(up1 down1) ⊙ (up2 down2): `up` (out, r), `down` (r, in·|kernel|).

    In the effective form of a convolution each of the two is Σ core_ij up_i down_j, with `core`
    (r, r, *kernel), `up` (r, out), `down` (r, in).
    """

    def __init__(self, site: Site, init: Init, method: LoHa) -> None:
        super().__init__(method)
        rows, columns, *kernel = self.shape = shape_of(site)
        r, normal = method.rank, method.init == "normal"
        effective = method.effective_conv and math.prod(kernel) > 1
        up, down = ((r, rows), (r, columns)) if effective else ((rows, r), (r, math.prod(self.shape[1:])))
        self.up1 = init.normal(*up, std=0.1) if normal else init.kaiming_uniform(*up)
        self.down1 = init.normal(*down) if normal else init.kaiming_uniform(*down)
        self.up2 = init.zeros(*up) if normal else init.kaiming_uniform(*up)
        self.down2 = init.normal(*down) if normal else init.zeros(*down)
        self.core1 = self.core2 = None
        if effective:
            core = (r, r, *kernel)
            self.core1 = init.normal(*core, std=0.1) if normal else init.kaiming_uniform(*core)
            self.core2 = init.normal(*core, std=0.1) if normal else init.kaiming_uniform(*core)

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in): by the r² products of columns and rows where these are fewer.

        (up1 down1) ⊙ (up2 down2) = Σ_ab (up1_a ⊙ up2_b)(down1_a ⊙ down2_b), a product of rank r².
        """
        (rows, columns), r = self.shape, len(self.down1)
        if r * r * (rows + columns) >= rows * columns:
            return F.linear(x, self.product(x))
        up1, down1, up2, down2 = (t.to(x.dtype) for t in (self.up1, self.down1, self.up2, self.down2))
        inner = F.linear(x, (self.scale * down1[:, None] * down2).flatten(0, 1))
        return F.linear(inner, (up1[:, :, None] * up2[:, None]).flatten(1))

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW, shaped like the layer's weight, in the dtype of `like`."""
        first = rebuilt(self.up1, self.down1, self.core1, like)
        second = rebuilt(self.up2, self.down2, self.core2, like)
        return (self.scale * first * second).view(self.shape)


def rebuilt(up: Tensor, down: Tensor, core: Tensor | None, like: Tensor) -> Tensor:
    """Return up·down, or Σ core_ij up_i down_j (out, in, *kernel), in the dtype of `like`."""
    up, down = up.to(like.dtype), down.to(like.dtype)
    return up @ down if core is None else torch.einsum("ij...,jc,io->oc...", core.to(like.dtype), down, up)


@dataclass(frozen=True)
class LoHa(RebuiltMethod):
    """The element-wise product of two low-rank matrices: rank up to r² for the numbers of rank 2r.

        W' = W + s·(A1 B1) ⊙ (A2 B2),   A (out, r), B (r, in),   s = alpha / rank

    A1, B1, A2 Kaiming-uniform (a=√5), B2 = 0; init="normal" is LyCORIS's start: B ~ N(0, 1),
    A1 ~ N(0, 0.01), A2 = 0. Convolutions: B (r, in·|kernel|); with `effective_conv` each product is
    Σ T_ij A_i B_j with T (r, r, *kernel). The tensors are `up1`, `down1`, `up2`, `down2` = A1, B1, A2,
    B2, and `core1`, `core2`.

    Parameters: 2r·(in + out) per linear layer, 2r·(in/groups·|kernel| + out) per convolution, or
    2r·(in/groups + out + r·|kernel|) in the effective form. arXiv 2108.06098 (the parameterisation),
    2309.14859 (LyCORIS), huggingface/peft. Differs: ΔW is not formed in the forward of a linear layer
    where r² is small beside it; the gradient is autograd's (peft's own is wrong in the effective form);
    `rank_dropout` divides by 1 − p, not by the kept fraction, which may be 0.
    """

    id: ClassVar[str] = "loha"
    paper: ClassVar[str] = "2108.06098"
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    lr: ClassVar[float] = 1e-2

    init: Literal["kaiming", "normal"] = setting("kaiming")

    def delta(self, site: Site, init: Init) -> HadamardProduct:
        check_rank(self, site, min(site.in_features, site.out_features))
        return HadamardProduct(site, init, self)
