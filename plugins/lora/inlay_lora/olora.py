"""OLoRA: the factors start as the first columns of the weight's QR decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from inlay.authoring import Init
from inlay_lora.start import Factors, Layer, Start


@dataclass(frozen=True, kw_only=True)
class OLoRA(Start):
    """Orthonormal LoRA: B starts with orthonormal columns, A as what of W lies along them.

        W = Q R,   B₀ = Q[:, :r],   A₀ = R[:r],   W' = W + s·(B A − B₀A₀)

    The factors are not divided by s: what learns is s times that part of W. The authors take ranks of
    32 and 64 and alpha 16. Deterministic; QR's signs may differ between devices. arXiv 2406.01775.
    Differs: they change the base to W − s·B₀A₀; here it stays, and (A₀, B₀) is kept beside (A, B).
    """

    id: ClassVar[str] = "olora"
    kept: ClassVar[bool] = True
    from_weight: ClassVar[bool] = True

    def factors(self, layer: Layer, init: Init) -> Factors:
        q, r = torch.linalg.qr(layer.weight())
        return r[: layer.rank], q[:, : layer.rank]
