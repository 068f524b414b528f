"""LoReFT: low-rank edits of the residual stream at the first and last positions of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import Adapter, At, Init, Method, OutputDelta, Site, hookimpl, setting


class Edit(OutputDelta):
    """Δh = Rᵀ(W h + b − R h) at the first `ends[0]` and last `ends[1]` prompt positions, else 0."""

    def __init__(self, site: Site, init: Init, method: LoReFT, ends: tuple[int, int]) -> None:
        super().__init__()
        features, rank = site.out_features, method.rank
        self.ends = ends
        self.basis = init.normal(features, rank)
        identity = method.start == "identity"
        self.weight = init.tensor(self.rotation()) if identity else init.kaiming_uniform(rank, features)
        self.bias = init.zeros(rank) if identity else init.uniform(rank, bound=features**-0.5)

    def rotation(self) -> Tensor:
        """Return R (r, d): the basis orthonormalised, in float32; a smooth function of it."""
        q, triangle = torch.linalg.qr(self.basis.float())
        return (q * triangle.diagonal().sign()).T

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δh (B, T, d) of the block's output y (B, T, d)."""
        if at.call is not None and at.call.past_length:
            return y.new_zeros(())
        rotation = self.rotation()
        edit = F.linear(y.float(), self.weight.float() - rotation, self.bias.float()) @ rotation
        return torch.where(chosen(prompt(y, at), *self.ends)[..., None], edit, 0).to(y.dtype)


def prompt(y: Tensor, at: At) -> Tensor:
    """Return which tokens belong to the prompt (B, T): the real ones before the first labelled one."""
    real = at.real(y)
    real = y.new_ones(y.shape[:2], dtype=torch.bool) if real is None else real
    labels = at.call.argument("labels") if at.call is not None and not at.site.side else None
    if labels is None or labels.dim() != 2:
        return real
    before = real & ((at.own(labels) != -100).cumsum(1) == 0)
    return torch.where(before.any(1, keepdim=True), before, real)


def chosen(prompt: Tensor, first: int, last: int) -> Tensor:
    """Return the first and last of each row's n prompt positions (B, T), at most n // 2 of each."""
    count = prompt.sum(1, keepdim=True)
    rank = prompt.cumsum(1) - 1
    ends = rank < (count // 2).clamp(max=first)
    return prompt & (ends | (rank >= count - (count // 2).clamp(max=last)))


@dataclass(frozen=True)
class LoReFT(Method):
    """Low-rank linear subspace edits: h' = h + Rᵀ(W h + b − R h) at the prompt's first and last tokens.

    R (r, d) has orthonormal rows, computed in float32 from a free matrix ~ N(0, 1); W (r, d) and b
    (r,) start as torch starts linear layers, or start="identity" with W = R, b = 0. Of a prompt of n
    tokens the first min(first, n//2) and last min(last, n//2) are edited; in training the prompt ends
    where labels begin. Decode steps run bare. Parameters: 2dr + r per block, twice if not tied.
    arXiv 2404.03592. R comes by QR where pyreft uses torch's orthogonal parametrisation.
    """

    id: ClassVar[str] = "loreft"
    paper: ClassVar[str] = "2404.03592"
    accepts: ClassVar[frozenset[str]] = frozenset({"block"})
    default_targets: ClassVar[tuple[str, ...]] = ("block",)
    reads_call: ClassVar[bool] = True
    weight_decay: ClassVar[float | None] = 0.0

    rank: int = setting(8, least=1)
    first: int = setting(7, least=0)
    last: int = setting(7, least=0)
    tied: bool = setting(True)
    start: Literal["random", "identity"] = setting("random")

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        return self.start == "identity"

    def suits(self, site: Site) -> bool:
        return site.side != "decoder"

    @staticmethod
    @hookimpl
    def inject(method: LoReFT, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        both = (method.first, method.last)
        for site in sites:
            for ends in (both,) if method.tied else ((method.first, 0), (0, method.last)):
                adapter.place(site, Edit(site, adapter.init(site), method, ends))
        return len(sites)
