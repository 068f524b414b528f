"""PiSSA: the factors start as the principal part of the layer's weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from inlay.authoring import Init, setting
from inlay_lora.start import Factors, Layer, Start, best, principal, split

SPARE = 8  # directions that a randomised decomposition looks for beyond those it gives


@dataclass(frozen=True, kw_only=True)
class PiSSA(Start):
    """Principal singular values and vectors: A and B start as what matters most in W, and learn that.

        W = U S Vᵀ,   B₀ = U_r √(S_r/s),   A₀ = √(S_r/s) V_rᵀ,   W' = W + s·(B A − B₀A₀)

    The exact SVD, or with `niter` that many rounds of a randomised one: seconds instead of minutes on
    large layers, within 0.1 % of the best error from about 16 on. The authors take alpha = rank, so s = 1.
    arXiv 2404.02948, GraphPKU/PiSSA. Differs: they put the residual W − s·B₀A₀ into the base; here the
    base stays, and (A₀, B₀) is kept and saved beside (A, B), at twice the cost of plain factors.
    """

    id: ClassVar[str] = "pissa"
    kept: ClassVar[bool] = True
    from_weight: ClassVar[bool] = True

    niter: int | None = setting(None, least=0)

    def factors(self, layer: Layer, init: Init) -> Factors:
        weight, r = layer.weight(), layer.rank
        if self.niter is None:
            return best(weight, r, layer.scale)
        left, singular, right = principal(weight, r + SPARE, self.niter, init.generator)
        return split(left[:, :r], singular[:r], right[:r], layer.scale)
