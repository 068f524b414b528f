"""VeRA: frozen random matrices shared by all layers, two learned vectors beside each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import Adapter, Init, LinearDelta, Ref, Site, setting
from inlay_reparam.sharing import ProjectingMethod


class Projections(nn.Module):
    """A (r, in_max) and B (out_max, r) ~ U(±√(6 / fan_in)), A drawn first: one frozen pair for all layers."""

    def __init__(self, init: Init, rank: int, columns: int, rows: int, *, saved: bool) -> None:
        super().__init__()
        self.register_buffer("A", init.kaiming_uniform(rank, columns, a=0).data, persistent=saved)
        self.register_buffer("B", init.kaiming_uniform(rows, rank, a=0).data, persistent=saved)


class ScaledProjections(LinearDelta):
    """Δy = λ_b ⊙ ((λ_d ⊙ (drop(x) Aᵀ)) Bᵀ), with A (r, in) and B (out, r) cut to the layer."""

    def __init__(self, site: Site, init: Init, shared: Ref, method: VeRA) -> None:
        super().__init__()
        self.lambda_d = init.full(method.rank, value=method.d_initial)
        self.lambda_b = init.zeros(site.out_features)
        self.shared, self.columns, self.rate = shared, site.in_features, method.dropout

    def cut(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return A (r, in), B (out, r), λ_d (r,) and λ_b (out,) in the dtype of `like`."""
        pair = self.shared.module
        found = pair.A[:, : self.columns], pair.B[: len(self.lambda_b)], self.lambda_d, self.lambda_b
        return tuple(t.to(like.dtype) for t in found)  # type: ignore[return-value]

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in), ΔW not formed."""
        A, B, d, b = self.cut(x)
        return F.linear(F.linear(x, A) * d, B) * b

    def product(self, like: Tensor) -> Tensor:
        """Return diag(λ_b) B diag(λ_d) A (out, in)."""
        A, B, d, b = self.cut(like)
        return b[:, None] * (B * d) @ A


@dataclass(frozen=True)
class VeRA(ProjectingMethod):
    """Two learned vectors scale a frozen random low-rank product that all layers share.

        ΔW = diag(λ_b) B diag(λ_d) A,   A (r, in), B (out, r) cut from A (r, in_max), B (out_max, r)

    No alpha / r. λ_d (r,) = d_initial, λ_b (out,) = 0: starts at the base model. A and B are
    U(±√(6 / fan_in)), drawn on the CPU in float32 by torch's generator seeded with `key`, A first.

    Parameters: r + out per layer. arXiv 2310.11454. Differs from peft, which draws the same: the pair
    is saved only with save_projection=True (another torch might draw other numbers), else it is made
    again from `key`; several adapters may have pairs of different ranks and keys.
    """

    id: ClassVar[str] = "vera"
    paper: ClassVar[str] = "2310.11454"
    lr: ClassVar[float] = 2e-2

    rank: int = setting(256, least=1)
    d_initial: float = setting(0.1)

    def common(self, sites: Sequence[Site], adapter: Adapter) -> nn.Module:
        init = adapter.init(shared="common")
        init.generator.manual_seed(self.key)
        columns, rows = max(s.in_features for s in sites), max(s.out_features for s in sites)
        return Projections(init, self.rank, columns, rows, saved=self.save_projection)

    def beside(self, site: Site, adapter: Adapter, common: Ref) -> ScaledProjections:
        return ScaledProjections(site, adapter.init(site), common, self)
