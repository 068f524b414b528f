"""MoLORA: several LoRAs per layer, mixed per token by a softmax router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import At, Composite, Delta, Init, Method, OutputDelta, Site, setting


class Mixture(OutputDelta):
    """Δy = Σ_e p_e(x) Δ_e(x, y), p(x) = softmax(R x) in float32, per token."""

    def __init__(self, site: Site, init: Init, experts: Sequence[Delta], top_k: int | None) -> None:
        super().__init__()
        self.router = init.normal(len(experts), site.in_features, std=0.02)
        self.experts, self.top_k = nn.ModuleList(experts), top_k
        self.reads = frozenset().union(*(expert.reads for expert in experts))

    def weights(self, x: Tensor) -> Tensor:
        """Return p (..., E) of x (..., in); all but the `top_k` largest are 0, without renormalising."""
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.float(), self.router.float()).softmax(-1)
        if self.top_k is None:
            return p
        return p * torch.zeros_like(p).scatter(-1, p.topk(self.top_k).indices, 1.0)

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (..., out) of x (..., in)."""
        p = self.weights(x).to(y.dtype)
        changes = [expert(x, y, at.part(str(e))) for e, expert in enumerate(self.experts)]
        return torch.stack([p[..., e, None] * change for e, change in enumerate(changes)]).sum(0)

    def why_not(self) -> str:
        return "its router weighs the experts by the token"


@dataclass(frozen=True)
class MoLORA(Composite):
    """A mixture of E experts of one method per layer: Σ_e p_e(x) Δ_e(x), p(x) = softmax(R x) per token.

    The paper's expert is LoRA(rank=4, alpha=16); any method that acts on outputs will do (with IA3 it is
    MoV). R (E, in) ~ N(0, 0.02²), no bias; top_k zeroes the rest without renormalising. Parameters: E
    times the expert's, + E·in per site. arXiv 2309.05444. LoRA starts here as LoRA does, where the
    paper draws A ~ N(0, 0.02²); expert outputs are mixed, E of them in memory at a time.
    """

    id: ClassVar[str] = "molora"
    paper: ClassVar[str] = "2309.05444"
    lr: ClassVar[float] = 3e-4

    expert: Method = setting()
    experts: int = setting(10, least=1)
    top_k: int | None = setting(None, least=1)

    def parts(self) -> Mapping[str, Method]:
        return {str(number): self.expert for number in range(self.experts)}

    def combine(self, site: Site, children: Mapping[str, Sequence[Delta]], init: Init) -> Delta:
        return Mixture(site, init, [own[0] for own in children.values()], self.top_k)
