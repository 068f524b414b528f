"""UniPELT: LoRA, a serial adapter and a prefix, each behind a gate that reads the layer's input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.authoring import (
    At,
    AttentionDelta,
    Composite,
    Delta,
    Init,
    KeyValues,
    Method,
    OutputDelta,
    Site,
    SublayerSite,
    setting,
)


class Gates(nn.Module):
    """G(x) = mean over real tokens of σ(x·w + b), (B, 1, 1): one number per part and example.

    Computed from the prompt and kept: a decode step reads the prompt's.
    """

    def __init__(self, site: Site, init: Init, parts: Sequence[str]) -> None:
        super().__init__()
        self.weight = nn.ParameterDict({part: init.normal(site.in_features, std=0.02) for part in parts})
        self.bias = nn.ParameterDict({part: init.zeros(1) for part in parts})

    def forward(self, part: str, x: Tensor, at: At) -> Tensor:
        kept = at.store
        if part not in kept or at.call is None or not at.call.past_length:
            gate = torch.sigmoid(x @ self.weight[part] + self.bias[part])
            real = at.real(x)
            real = torch.ones_like(gate) if real is None else real.to(gate.dtype)
            kept[part] = ((gate * real).sum(1) / real.sum(1))[:, None, None]
        return kept[part]


class Gated(Delta):
    """What the gated deltas of a site share: their children by part, and the gates."""

    def __init__(self, site: Site, init: Init, children: Mapping[str, Sequence[Delta]]) -> None:
        super().__init__()
        self.children_of = nn.ModuleDict({part: nn.ModuleList(own) for part, own in children.items()})
        self.gates = Gates(site, init, list(children))
        self.reads = frozenset(self.reads).union(*(d.reads for own in children.values() for d in own))

    def each(self, at: At) -> Iterator[tuple[str, Delta, At]]:
        """Yield (part, delta, the part's own view of here)."""
        return ((part, d, at.part(part)) for part, own in self.children_of.items() for d in own)

    def why_not(self) -> str:
        return "its gate depends on the input"


class GatedOutput(Gated, OutputDelta):
    """Δy = G(x) Δ(x, y); behind a sublayer the gate reads what the block would give, LN(y + residual)."""

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (B, T, out) of x (B, T, in)."""
        start = y
        for part, delta, inner in self.each(at):
            read = at.norm(y + at.residual) if isinstance(at.site, SublayerSite) else x
            y = y + self.gates(part, read, at) * delta(x, y, inner)
        return y - start


class GatedColumns(Gated, AttentionDelta):
    """Keys and values G(x) P_K, G(x) P_V, one gate for both."""

    reads: ClassVar[frozenset[str]] = frozenset({"x"})

    def forward(self, at: At) -> KeyValues:
        """Return keys and values (B, H_kv, p, D)."""
        columns = []
        for part, delta, inner in self.each(at):
            gate, found = self.gates(part, at.x, at)[..., None], delta(inner)
            columns.append(found._replace(key=gate * found.key, value=gate * found.value))
        return columns[0]


@dataclass(frozen=True)
class UniPELT(Composite):
    """Gated parts: q and v by LoRA, the block by a serial adapter, attention by a prefix.

    Each part's change is multiplied by G(x) = mean over real tokens of σ(x·w + b), one gate per site, w
    ~ N(0, 0.02²), b = 0, so G ≈ 1/2 at the start; G is 1 with no effect on LoRA's own scale, which the
    gate replaces (use alpha = rank). x: what the attention reads, for the adapter LN(y + residual).
    Parameters: the parts' and d + 1 per gate. arXiv 2110.07577, morningmoni/UniPELT; there the mean
    runs over padding too.
    """

    id: ClassVar[str] = "unipelt"
    paper: ClassVar[str] = "2110.07577"
    reads_call: ClassVar[bool] = True

    lora: Method | None = setting(None)
    adapter: Method | None = setting(None)
    prefix: Method | None = setting(None)

    def parts(self) -> Mapping[str, Method]:
        named = {"lora": self.lora, "adapter": self.adapter, "prefix": self.prefix}
        return {name: part for name, part in named.items() if part is not None}

    def combine(self, site: Site, children: Mapping[str, Sequence[Delta]], init: Init) -> Delta:
        return (GatedColumns if site.kind == "attention" else GatedOutput)(site, init, children)
