"""VeRA: frozen random matrices shared by all sites, two learned vectors per site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import Adapter, At, Init, Method, OutputDelta, Ref, Site, hookimpl, setting


class Projections(nn.Module):
    """A (r, in_max) and B (out_max, r) ~ KU(0), A drawn first; buffers, one pair for the whole adapter."""

    def __init__(self, init: Init, rank: int, columns: int, rows: int, *, saved: bool) -> None:
        super().__init__()
        self.register_buffer("A", init.kaiming_uniform(rank, columns, a=0).data, persistent=saved)
        self.register_buffer("B", init.kaiming_uniform(rows, rank, a=0).data, persistent=saved)


class ScaledProjections(OutputDelta):
    """Δy = λ_b ⊙ ((λ_d ⊙ (drop(x) Aᵀ)) Bᵀ), with A and B cut to the site."""

    def __init__(self, site: Site, init: Init, shared: Ref, method: VeRA) -> None:
        super().__init__()
        self.lambda_d = init.full(method.rank, value=method.d_initial)
        self.lambda_b = init.zeros(site.out_features)
        self.shared, self.columns, self.rate = shared, site.in_features, method.dropout

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r)."""
        return self.shared.module.A[:, : self.columns], self.shared.module.B[: len(self.lambda_b)]

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (..., out) of x (..., in)."""
        down, up = self.matrices()
        inner = F.linear(F.dropout(x, self.rate, self.training), down) * self.lambda_d
        return F.linear(inner, up) * self.lambda_b

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        down, up = (m.to(weight.dtype) for m in self.matrices())
        return weight + (self.lambda_b[:, None] * up) @ (self.lambda_d[:, None] * down), bias


@dataclass(frozen=True)
class VeRA(Method):
    """Vector-based random matrix adaptation: ΔW = diag(λ_b) B diag(λ_d) A.

    A (r, in_max) and B (out_max, r) ~ KU(0) from `key`, frozen, one pair for all sites, sliced; λ_d
    (r,) = d_initial, λ_b (out,) = 0. No alpha / r. Parameters: r + out per site. arXiv 2310.11454.
    With save_projection=False the pair is made again from `key` when loading.
    """

    id: ClassVar[str] = "vera"
    paper: ClassVar[str] = "2310.11454"
    lr: ClassVar[float] = 1e-2

    rank: int = setting(256, least=1)
    d_initial: float = setting(0.1)
    key: int = setting(0, least=0)
    save_projection: bool = setting(True)
    dropout: float = setting(0.0, least=0, below=1)

    @staticmethod
    @hookimpl
    def inject(method: VeRA, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        init = adapter.init(shared="vera", seed=method.key)
        columns, rows = max(s.in_features for s in sites), max(s.out_features for s in sites)
        made = Projections(init, method.rank, columns, rows, saved=method.save_projection)
        shared = adapter.share("projections", made)
        for site in sites:
            adapter.place(site, ScaledProjections(site, adapter.init(site), shared, method))
        return len(sites)
