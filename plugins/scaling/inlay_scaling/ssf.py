"""SSF: a learned scale and shift behind every linear layer and norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inlay.authoring import At, Init, Method, OutputDelta, Site, setting


class ScaleShift(OutputDelta):
    """Δy = (γ − 1)⊙y + β over channels. `scale` (c,) is γ − 1, `shift` (c,) is β."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, site: Site, init: Init, std: float) -> None:
        super().__init__()
        self.scale = init.normal(site.out_features, std=std)
        self.shift = init.normal(site.out_features, std=std)
        beside = site.module.weight.dim() - 2 if site.kind == "conv" else 0  # type: ignore[operator]
        self.shape = (-1, *(1,) * beside)  # channels come first, as in (B, c, H, W), or last

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy of y: (*, c), or (B, c, …) behind a convolution."""
        scale, shift = self.scale.to(y.dtype).view(self.shape), self.shift.to(y.dtype).view(self.shape)
        return torch.addcmul(shift, scale, y)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (γ⊙W by rows, γ⊙b + β); a β that is 0 asks for no bias where there was none."""
        gamma, beta = 1 + self.scale.to(weight.dtype), self.shift.to(weight.dtype)
        weight = gamma.view(-1, *(1,) * (weight.dim() - 1)) * weight
        if bias is None:
            return weight, beta if bool(beta.any()) else None
        return weight, gamma * bias + beta


@dataclass(frozen=True)
class SSF(Method):
    """A scale and a shift of every channel that a linear layer, norm or patch embedding gives.

        y' = γ ⊙ y + β

    before activation, dropout and residual. γ ~ N(1, σ²), β ~ N(0, σ²) with σ = init_std = 0.02 as
    in the authors' code: starts near, not at, the base model; init_std=0 starts at it. Roles that
    are slices of a fused projection have a pair each.

    Parameters: 2·c per site; 2·(7d + d_ff) per ViT layer. No weight decay on vectors.
    arXiv 2210.08823, dongzelian/SSF. Differs: kept as γ − 1. Folds everywhere except into a norm
    without a bias (RMSNorm) whose β is not 0; targets=["linear"] avoids those.
    """

    id: ClassVar[str] = "ssf"
    paper: ClassVar[str] = "2210.08823"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "norm"})
    default_targets: ClassVar[tuple[str, ...]] = ("linear", "norm")
    optional_targets: ClassVar[tuple[str, ...]] = ("embedding", "pooler")
    lr: ClassVar[float] = 3e-3
    weight_decay: ClassVar[float | None] = 0.0

    init_std: float = setting(0.02, least=0)

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        return self.init_std == 0

    def delta(self, site: Site, init: Init) -> ScaleShift:
        return ScaleShift(site, init, self.init_std)
