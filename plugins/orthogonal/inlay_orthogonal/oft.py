"""OFT: what a layer reads, turned in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inlay.authoring import Init, Method, Site, setting
from inlay_orthogonal.blocks import by_blocks, cayley, check_divides, series, skew, some_left_out, within
from inlay_orthogonal.rotation import Rotated, Rotation, rotated, width


class Blocks(Rotation):
    """R = blockdiag(R₁ … R_k): `skew` (k, b(b−1)/2), or (1, …) if shared, holds the triangles of S."""

    def __init__(self, site: Site, init: Init, method: OFT) -> None:
        super().__init__()
        size, features = method.block_size, width(site)
        check_divides("block_size", size, features, site)
        self.skew = init.zeros(1 if method.shared else features // size, size * (size - 1) // 2)
        self.method = method

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        """Return x (R − I), or x (Rᵀ − I), of x (*, d)."""
        method = self.method
        with torch.autocast(x.device.type, enabled=False):
            s = skew(self.skew, method.block_size)
            if method.epsilon is not None:
                s = within(s, method.epsilon / len(s) ** 0.5)
            change = cayley(s) if method.cayley == "exact" else series(s, method.terms)
        if method.dropout and self.training:
            change = some_left_out(change[None], method.dropout)[0]
        return by_blocks(x, (change.mT if back else change).to(x.dtype))


@dataclass(frozen=True)
class OFT(Method):
    """Orthogonal fine-tuning: what each layer reads is turned, block by block of its features.

        y = (x R) Wᵀ + b,   R = blockdiag(R₁ … R_k),   R_i = (I + S_i)(I − S_i)⁻¹ of size b

    S_i skew, kept as its strict upper triangle, 0 at the start; W' = W Rᵀ keeps the norms of W's
    rows and the angles between them. cayley="series" (T = `terms`: I + 2S + … + 2S^(T−2) + S^(T−1),
    the faster) needs ‖S‖ < 1 and is orthogonal up to ‖S‖^(2T−2) for even T; "exact" solves.
    `shared`: one block for all of a layer. `epsilon` scales S_i down to ‖S_i‖ ≤ ε/√k (COFT). `dropout` leaves
    that share of the blocks unturned in training. Convolutions: W of (out, in·|kernel|) is turned;
    embeddings: their rows, e = E[t] R.

    Parameters: in·(b − 1)/2 per layer, (b − 1)·b/2 if shared. arXiv 2306.07280, Zeju1997/oft;
    series and turned inputs: OFTv2. Differs: the authors turn the other way (S for −S), as peft
    does without its series; peft takes 5 terms, which is less orthogonal than 4. COFT's limit is part of
    the formula and its gradient; they write the limited S back into the parameter in each forward.
    """

    id: ClassVar[str] = "oft"
    paper: ClassVar[str] = "2306.07280"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "embedding"})
    lr: ClassVar[float] = 4e-3
    weight_decay: ClassVar[float | None] = 0.0

    block_size: int = setting(32, least=2)
    cayley: Literal["series", "exact"] = setting("series")
    terms: int = setting(6, least=2, most=32)
    shared: bool = setting(False)
    epsilon: float | None = setting(None, above=0)
    dropout: float = setting(0.0, least=0, below=1)

    def delta(self, site: Site, init: Init) -> Rotated:
        return rotated(site, Blocks(site, init, self), self.dropout)
