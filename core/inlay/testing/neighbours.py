"""Small methods of the kit's own, one for each face, to stack a method under test with.

They let a plugin test composition without any other plugin. All start as the identity but
`Columns`; their ids begin with "kit_".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hypothesis import strategies as st
from torch import Tensor

from inlay.authoring import (
    At,
    AttentionDelta,
    AttentionSite,
    Init,
    InputDelta,
    KeyValues,
    Method,
    OutputDelta,
    SequenceDelta,
    Shift,
    Site,
    Trained,
    register,
    setting,
)
from inlay.delta import WeightDelta
from inlay.testing.cases import Joined


class LowRank(OutputDelta):
    """Δy = B(Ax), B zero at the start."""

    def __init__(self, site: Site, init: Init, rank: int) -> None:
        super().__init__()
        self.A = init.kaiming_uniform(rank, site.in_features)
        self.B = init.zeros(site.out_features, rank)

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        return x @ self.A.T @ self.B.T

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.B.to(weight.dtype) @ self.A.to(weight.dtype), bias


class Gain(InputDelta):
    """Δx = (g − 1) ⊙ x, g one at the start."""

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.gain = init.ones(site.in_features)

    def forward(self, x: Tensor, at: At) -> Tensor:
        return (self.gain - 1) * x

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.gain.to(weight.dtype), bias


class Bend(OutputDelta):
    """Δy = g ⊙ tanh(y), g zero at the start: reads y and has no weight form."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.gain = init.zeros(site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        return self.gain * y.tanh()


class Columns(AttentionDelta):
    """Two extra keys and values; never the identity."""

    def __init__(self, site: AttentionSite, init: Init) -> None:
        super().__init__()
        self.key = init.normal(1, site.kv_heads, 2, site.head_dim)
        self.value = init.normal(1, site.kv_heads, 2, site.head_dim)

    def forward(self, at: At) -> KeyValues:
        return KeyValues(self.key, self.value)


class Rows(SequenceDelta):
    """Two virtual tokens."""

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.rows = init.normal(2, site.in_features)

    def forward(self, at: At) -> Tensor:
        return self.rows


@register
@dataclass(frozen=True)
class KitLowRank(Method):
    """A low-rank change of linear layers: the output face, a function of x."""

    id: ClassVar[str] = "kit_low_rank"
    rank: int = setting(2, least=1)

    def delta(self, site: Site, init: Init) -> LowRank:
        return LowRank(site, init, self.rank)


@register
@dataclass(frozen=True)
class KitGain(Method):
    """A gain on what linear layers read: the input face."""

    id: ClassVar[str] = "kit_gain"
    default_targets: ClassVar[tuple[str, ...]] = ("output", "down")

    def delta(self, site: Site, init: Init) -> Gain:
        return Gain(site, init)


@register
@dataclass(frozen=True)
class KitBend(Method):
    """A bent sublayer output: the output face, a function of y."""

    id: ClassVar[str] = "kit_bend"
    accepts: ClassVar[frozenset[str]] = frozenset({"sublayer"})
    default_targets: ClassVar[tuple[str, ...]] = ("attention", "ffn")

    def delta(self, site: Site, init: Init) -> Bend:
        return Bend(site, init)


@register
@dataclass(frozen=True)
class KitBlock(Method):
    """A bent block output."""

    id: ClassVar[str] = "kit_block"
    accepts: ClassVar[frozenset[str]] = frozenset({"block"})
    default_targets: ClassVar[tuple[str, ...]] = ("block",)

    def delta(self, site: Site, init: Init) -> Bend:
        return Bend(site, init)


@register
@dataclass(frozen=True)
class KitShift(Method):
    """Shifted norms: the weight face, by running the layer with changed tensors."""

    id: ClassVar[str] = "kit_shift"
    accepts: ClassVar[frozenset[str]] = frozenset({"norm"})
    default_targets: ClassVar[tuple[str, ...]] = ("norm",)

    def delta(self, site: Site, init: Init) -> WeightDelta:
        return Shift(site, init)  # type: ignore[arg-type]


@register
@dataclass(frozen=True)
class KitColumns(Method):
    """Extra attention columns."""

    id: ClassVar[str] = "kit_columns"
    accepts: ClassVar[frozenset[str]] = frozenset({"attention"})
    default_targets: ClassVar[tuple[str, ...]] = ("attention",)
    starts_as_identity: ClassVar[bool] = False

    def delta(self, site: Site, init: Init) -> Columns:
        return Columns(site, init)  # type: ignore[arg-type]


@register
@dataclass(frozen=True)
class KitRows(Method):
    """Virtual tokens: the sequence face."""

    id: ClassVar[str] = "kit_rows"
    accepts: ClassVar[frozenset[str]] = frozenset({"sequence"})
    default_targets: ClassVar[tuple[str, ...]] = ("embedding",)
    starts_as_identity: ClassVar[bool] = False

    def delta(self, site: Site, init: Init) -> Rows:
        return Rows(site, init)


LOW_RANK = Joined(
    KitLowRank, st.builds(KitLowRank, rank=st.integers(1, 3)), merges=True,
    targets=(None, ("linear",), ("key", "up")),
    parameters=lambda method, sites: sum(method.rank * (s.in_features + s.out_features) for s in sites),
)  # fmt: skip
GAIN = Joined(
    KitGain, st.builds(KitGain), merges=True, parameters=lambda _, sites: sum(s.in_features for s in sites)
)
BEND = Joined(KitBend, st.builds(KitBend), parameters=lambda _, sites: sum(s.out_features for s in sites))
BLOCK = Joined(KitBlock, st.builds(KitBlock), parameters=lambda _, sites: sum(s.out_features for s in sites))
SHIFT = Joined(KitShift, st.builds(KitShift), merges=True, by_layer=False)
COLUMNS = Joined(
    KitColumns, st.builds(KitColumns),
    parameters=lambda _, sites: sum(4 * s.kv_heads * s.head_dim for s in sites),  # type: ignore[attr-defined]
)  # fmt: skip
ROWS = Joined(KitRows, st.builds(KitRows), by_layer=False,
              parameters=lambda _, sites: 2 * sites[0].in_features)  # fmt: skip
HEAD = Joined(
    Trained, st.builds(Trained), families=("llama", "bert", "vit"), merges=True, replaces=True,
    by_layer=False,
)  # fmt: skip
OWN = Joined(
    Trained, st.builds(Trained), families=("llama", "gpt2", "bert", "vit"), merges=True, replaces=True,
    targets=(("query", "value"), ("norm", "down")),
)  # fmt: skip
NEIGHBOURS = (LOW_RANK, GAIN, BEND, BLOCK, SHIFT, COLUMNS, ROWS, HEAD, OWN)
