"""LT-SFT: dense differences first, then only the entries that moved most, from zero again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.authoring import Adapter, Change, Compact, Method, Shift, Site, Stage, Weights, hookimpl, setting

TENSORS = ("weight", "bias")


class Difference(Shift):
    """W' = W + δ_W, b' = b + δ_b: dense, or after `keep` only values at flat indices, zero elsewhere."""

    def keep(self, name: str, indices: Tensor) -> None:
        """Let only the entries of δ at `indices` (k,) go on, from zero."""
        values = nn.Parameter(torch.zeros_like(getattr(self, name).view(-1)[: len(indices)]))
        setattr(self, name, values if len(indices) else None)
        self.register_buffer(f"{name}_indices", indices if len(indices) else None)

    def forward(self, level: Weights) -> Change:
        return Change(*(self.change(name) for name in TENSORS))

    def change(self, name: str) -> Tensor | Compact | None:
        """Return the difference of "weight" or "bias", or None."""
        values, indices = getattr(self, name), getattr(self, f"{name}_indices", None)
        return values if indices is None else Compact(indices, values)


@dataclass(frozen=True)
class LTSFT(Method):
    """Lottery-ticket sparse fine-tuning: θ' = θ + δ, δ dense first, then K entries of it.

    Stage "full" trains every entry of the targets from δ = 0; `inlay.advance` keeps the K of largest
    |δ| over all targets (ties: the first), as values at int32 indices, and sets them to 0. K = count,
    or density times the entries. Loss + l1·Σ|δ| / N, N the base's size. Parameters: the targets', then
    K. arXiv 2110.07560, cambridgeltl/composable-sft with n_ft_iterations = 1. A head learns whole by
    `train=("head",)`, and is not rewound here.
    """

    id: ClassVar[str] = "lt_sft"
    paper: ClassVar[str] = "2110.07560"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding"})
    default_targets: ClassVar[tuple[str, ...]] = ("embedding", "linear")
    lr: ClassVar[float] = 5e-5
    weight_decay: ClassVar[float | None] = 0.0

    count: int | None = setting(None, least=1)
    density: float = setting(0.01, above=0, most=1)
    l1: float = setting(0.1, least=0)

    @staticmethod
    @hookimpl
    def inject(method: LTSFT, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        for number, site in enumerate(sites):
            delta = Difference(site, adapter.init(site))
            adapter.place(site, delta)
            for name, kept in zip(TENSORS, adapter.data["kept"][number] if "kept" in adapter.data else ()):
                if kept is not None:
                    device = getattr(delta, name).device
                    delta.keep(name, torch.zeros(kept, dtype=torch.int32, device=device))
        return len(sites)

    @staticmethod
    @hookimpl
    def stages(method: LTSFT, adapter: Adapter) -> list[Stage]:
        full = Stage("full", finish=partial(select, method))
        return [Stage("sparse")] if "kept" in adapter.data else [full, Stage("sparse")]

    @staticmethod
    @hookimpl
    def auxiliary_loss(method: LTSFT, adapter: Adapter) -> Tensor | None:
        moved = [p.abs().sum() for _, p in adapter.named_parameters()]
        return method.l1 / adapter.base_size * torch.stack(moved).sum() if method.l1 else None


def select(method: LTSFT, adapter: Adapter) -> None:
    """Keep the K entries of largest |δ| of all of the adapter's tensors."""
    tensors = [(d, n, getattr(d, n)) for _, d in adapter.placed for n in TENSORS if getattr(d, n) is not None]
    count = method.count or max(1, round(method.density * sum(t.numel() for *_, t in tensors)))
    tops = [t.detach().abs().view(-1).sort(descending=True, stable=True) for *_, t in tensors]
    best = torch.cat([t.values[:count] for t in tops]).sort(descending=True, stable=True).indices[:count]
    owner = torch.cat([torch.full_like(t.indices[:count], i) for i, t in enumerate(tops)])[best]
    entry = torch.cat([t.indices[:count] for t in tops])[best]
    for number, (delta, name, _) in enumerate(tensors):
        delta.keep(name, entry[owner == number].sort().values.int())
    sizes = {(id(d), n): int((owner == i).sum()) for i, (d, n, _) in enumerate(tensors)}
    adapter.data["kept"] = [[sizes.get((id(d), n)) for n in TENSORS] for _, d in adapter.placed]
