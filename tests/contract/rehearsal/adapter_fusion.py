"""AdapterFusion: attention over the branches of adapters that are attached already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import (
    Adapter,
    At,
    ConfigError,
    Delta,
    Group,
    Init,
    Method,
    OutputDelta,
    Ref,
    Site,
    hookimpl,
    setting,
)


class Fusion(OutputDelta):
    """Δy = Σ_n α_n V z_n, α = softmax_n(drop((Q h + b_Q)·(K z_n + b_K))), h = LN(y + residual)."""

    def __init__(self, site: Site, init: Init, branches: Sequence[Delta], dropout: float) -> None:
        super().__init__()
        d = site.out_features
        self.branches, self.rate = [Ref(branch) for branch in branches], dropout
        self.query, self.query_bias = init.normal(d, d, std=0.02), init.zeros(d)
        self.key, self.key_bias = init.normal(d, d, std=0.02), init.zeros(d)
        self.value = init.tensor(torch.full((d, d), 1e-6).fill_diagonal_(1.0))
        self.reads = frozenset({"y", "residual", "norm"}).union(*(b.reads for b in branches))

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (B, T, d) of y (B, T, d)."""
        z = torch.stack([branch(x, y, at) for branch in self.branches], dim=-2)
        query = F.linear(at.norm(y + at.residual), self.query, self.query_bias)
        scores = (F.linear(z, self.key, self.key_bias) @ query[..., None]).squeeze(-1)
        weights = F.dropout(scores, self.rate, self.training).softmax(-1)
        return (weights[..., None] * F.linear(z, self.value)).sum(-2)

    def drift(self) -> Tensor:
        """Return ‖I − V‖_F²."""
        identity = torch.eye(len(self.value), device=self.value.device, dtype=self.value.dtype)
        return (identity - self.value).square().sum()


@dataclass(frozen=True)
class AdapterFusion(Method):
    """Per-token attention over N trained adapters: y + Σ_n α_n V z_n, z_n their branches without skip.

    `adapters` names them; attach them first with activate=False, trainable=False. Q, K (d, d) ~
    N(0, 0.02²), biases 0, V (d, d) = identity with 1e-6 beside the diagonal; one head, no 1/√d. Loss +
    regularisation·Σ‖I − V‖². Parameters: 3d² + 2d per site. arXiv 2005.00247, adapter-hub/adapters
    ("dynamic", without temperature). Weight decay spares V, as there.
    """

    id: ClassVar[str] = "adapter_fusion"
    paper: ClassVar[str] = "2005.00247"
    accepts: ClassVar[frozenset[str]] = frozenset({"sublayer"})
    default_targets: ClassVar[tuple[str, ...]] = ("ffn",)
    lr: ClassVar[float] = 5e-5
    starts_as_identity: ClassVar[bool] = False

    adapters: tuple[str, ...] = setting()
    regularization: float = setting(0.01, least=0)
    dropout: float = setting(0.0, least=0, below=1)

    @staticmethod
    @hookimpl
    def inject(method: AdapterFusion, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        fused = {name: adapter.attached(name) for name in method.adapters}
        for site in sites:
            missing = [name for name, other in fused.items() if not other.at(site)]
            if missing or not fused:
                raise ConfigError(
                    "all fused adapters must sit at every site of the fusion",
                    saw=f"{site.name} has none of {missing or 'adapters=()'}",
                    do="give the fusion and its adapters the same targets",
                )
            branches = [other.at(site)[0] for other in fused.values()]
            adapter.place(site, Fusion(site, adapter.init(site), branches, method.dropout))
        return len(sites)

    @staticmethod
    @hookimpl
    def auxiliary_loss(method: AdapterFusion, adapter: Adapter) -> Tensor:
        return method.regularization * torch.stack([fusion.drift() for _, fusion in adapter.placed]).sum()

    @staticmethod
    @hookimpl
    def parameter_groups(method: AdapterFusion, adapter: Adapter, lr: float | None) -> list[Group]:  # type: ignore[override]
        names, rate = adapter.trainable_names(), method.lr if lr is None else lr
        values = [name for name in names if name.endswith(".value")]
        return [Group([n for n in names if n not in values], rate), Group(values, rate, 0.0)]
