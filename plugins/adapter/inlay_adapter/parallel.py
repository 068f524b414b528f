"""Parallel adapters: a bottleneck beside a sublayer, plain or scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from inlay.authoring import At, Init, Site, SublayerSite, setting
from inlay_adapter.bottleneck import Activation, Bottleneck, BottleneckMethod, Scale, Shape, Start


class ParallelBottleneck(Bottleneck):
    """Δy = z(x): reads what the sublayer reads, so it commutes with what acts on the output."""

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (B, T, d) of x (B, T, d)."""
        return self.branch(x, self.rate)


class ResidualBottleneck(Bottleneck):
    """Δy = z(residual): on pre-norm models the stream before the norm, else the same as x."""

    reads: ClassVar[frozenset[str]] = frozenset({"residual"})

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (B, T, d) of the residual (B, T, d)."""
        return self.branch(at.residual, self.rate)


@dataclass(frozen=True)
class ParallelAdapter(BottleneckMethod):
    """A bottleneck from a sublayer's input to its output, added before the residual ("scaled PA").

        y' = y + s·(U drop(σ(D x + b_D)) + b_U),   D (r, d), U (d, r)

    x is what the sublayer's first linear layer reads (input="normed"), or the residual
    (input="residual", adapter-hub/adapters' reading; the same on post-norm models). init="lora":
    D Kaiming-uniform (a=√5), U = 0, biases 0: starts at the base model. s: a number (4 for
    generation, 2 on GLUE in the scripts), "learned" (one scalar per site, from 1) or "channel"
    (d of them, from 1). The paper takes the model's hidden dropout on the activation: 0.1 here.

    Parameters: sites·P(d, r), P = 2dr + r + d; + sites if s learns. arXiv 2110.04366,
    jxhe/unify-parameter-efficient-tuning. Left out: the layer norm inside the branch, which the
    paper's feed-forward adapters do not use.
    """

    id: ClassVar[str] = "parallel_adapter"
    paper: ClassVar[str] = "2110.04366"
    default_targets: ClassVar[tuple[str, ...]] = ("ffn",)
    lr: ClassVar[float] = 2e-4  # with 512 units and s = 4 a step moves y much further than serial ones do

    rank: int = setting(512, least=1)
    scale: Scale = setting(4.0)
    act: Activation = setting("relu")
    init: Start = setting("lora")
    init_std: float | None = setting(None, least=0)
    dropout: float = setting(0.1, least=0, below=1)
    input: Literal["normed", "residual"] = setting("normed")

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        return self.init == "lora"

    def suits(self, site: Site) -> bool:
        return self.input == "normed" or getattr(site, "residual", None) is not None

    def unsuited(self) -> str:
        return 'use input="normed": the residual is not found there'

    def delta(self, site: Site, init: Init) -> Bottleneck:
        assert isinstance(site, SublayerSite)
        shape = Shape(self.rank, self.act, self.init, self.init_std, self.scale, self.dropout)
        kind = ParallelBottleneck if self.input == "normed" else ResidualBottleneck
        return kind(site, init, shape)
