"""Hyperformer and Hyperformer++: adapters generated from task embeddings, once per call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import Adapter, At, Call, Init, Method, OutputDelta, Ref, Site, hookimpl, setting


class Network(nn.Module):
    """Task embeddings z (K, t) → one adapter's tensors side by side (K, 2dr + r + 3d): G I + g.

    I = z, or in the shared variant I = LN(W₂ ReLU(W₁ [z; l; p])) with embeddings l of the layer and
    p of the position in it, all of them this network's own.
    """

    def __init__(self, init: Init, method: Hyperformer, layers: int, width: int) -> None:
        super().__init__()
        size, shared = method.embedding, method.variant == "shared"
        read = method.projected if shared else size
        self.weight, self.bias = init.normal(width, read, std=0.01), init.zeros(width)
        self.layers = init.normal(layers, size) if shared else None
        self.positions = init.normal(2, size) if shared else None
        self.mix = init.module(lambda: mixer(3 * size, method.hidden, read)) if shared else None

    def forward(self, z: Tensor, layer: int, position: int) -> Tensor:
        if self.mix is not None:
            where = torch.cat((self.layers[layer], self.positions[position])).expand(len(z), -1)
            z = self.mix(torch.cat((z, where), dim=1))
        return F.linear(z, self.weight, self.bias)


def mixer(read: int, hidden: int, given: int) -> nn.Module:
    first, second = nn.Linear(read, hidden), nn.Linear(hidden, given)
    return nn.Sequential(first, nn.ReLU(), second, nn.LayerNorm(given, eps=1e-6))


class Generated(OutputDelta):
    """Δy = γ ⊙ norm(U gelu(D y + b_D) + b_U) + β, all six tensors per task from the hypernetwork."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, site: Site, rank: int, network: Ref) -> None:
        super().__init__()
        d, self.network = site.out_features, network
        self.shapes = [(rank, d), (rank,), (d, rank), (d,), (d,), (d,)]
        self.where = (site.layer, int(site.role == "attention"))

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (B, T, d) of y (B, T, d)."""
        rows = at.prepared[at.site.name][at.own(at.prepared["which"])]
        pieces = rows.split([torch.Size(s).numel() for s in self.shapes], dim=1)
        down, c, up, b, scale, shift = (p.unflatten(1, s) for p, s in zip(pieces, self.shapes, strict=True))
        inner = F.gelu(y @ down.mT + c[:, None], approximate="tanh")
        z = F.layer_norm(inner @ up.mT + b[:, None], y.shape[-1:], eps=1e-5)
        return scale[:, None] * z + shift[:, None]


@dataclass(frozen=True)
class Hyperformer(Method):
    """Task-conditioned adapters on sublayer outputs: A(y) = y + γ ⊙ norm(U gelu(D y + b_D) + b_U) + β.

    D (r, d), b_D, U (d, r), b_U, γ, β (d,) are linear in I, weights N(0, 0.01²), biases 0. "layer": one
    generator per site, I = z_τ; "shared" (++): one per stack, I = MLP [z_τ; layer; position]. z_τ,
    layer and position embeddings (t,) ~ N(0, 1). Tasks come from `inlay.route(model, name, tasks=[...])`.
    Parameters: (size of I + 1)(2dr + r + 3d) per generator + tasks·t (+ per stack the MLP, its norm,
    t·layers + 2t). arXiv 2106.04489. Acts after the sublayer's dropout, not before; layer norms learn
    by `train=("norm",)`.
    """

    id: ClassVar[str] = "hyperformer"
    paper: ClassVar[str] = "2106.04489"
    accepts: ClassVar[frozenset[str]] = frozenset({"sublayer"})
    default_targets: ClassVar[tuple[str, ...]] = ("attention", "ffn")
    starts_as_identity: ClassVar[bool] = False
    prepares: ClassVar[bool] = True

    tasks: int = setting(least=1)
    variant: Literal["layer", "shared"] = setting("shared")
    reduction: int = setting(32, least=1)
    embedding: int = setting(64, least=1)
    hidden: int = setting(128, least=1)
    projected: int = setting(64, least=1)

    @staticmethod
    @hookimpl
    def inject(method: Hyperformer, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        table = adapter.init(shared="tasks").normal(method.tasks, method.embedding)
        adapter.share("tasks", nn.ParameterList([table]))
        networks: dict[str, Ref] = {}
        for site in sites:
            rank = max(1, site.out_features // method.reduction)
            width = 2 * site.out_features * rank + rank + 3 * site.out_features
            layers = 1 + max(s.layer for s in sites if s.side == site.side)
            own = (
                f"{site.side}_{site.role}_{site.layer}" if method.variant == "layer" else site.side or "stack"
            )
            if own not in networks:
                made = Network(adapter.init(shared=own), method, layers, width)
                networks[own] = adapter.share(own, made)
            adapter.place(site, Generated(site, rank, networks[own]))
        return len(sites)

    @staticmethod
    @hookimpl
    def prepare(method: Hyperformer, adapter: Adapter, call: Call) -> dict[str, Tensor]:
        tasks, which = call.task_ids(method.tasks)
        z = adapter.shared["tasks"][0][tasks]
        return {"which": which} | {s.name: d.network(z, *d.where) for s, d in adapter.placed}
