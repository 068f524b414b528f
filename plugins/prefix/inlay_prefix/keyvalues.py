"""Prefixes: extra keys and values of an attention module, its own or made by a generator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import (
    Adapter,
    At,
    AttentionDelta,
    AttentionSite,
    Call,
    Group,
    Init,
    KeyValues,
    Method,
    Site,
    Stage,
    hookimpl,
    setting,
)


class Prefix(AttentionDelta):
    """p keys and values of one attention module, (H_kv, p, D) each: parameters once `hold` set them.

    Until then they are read from what the generator prepared for this call.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.rate = dropout
        self.key: nn.Parameter | None = None
        self.value: nn.Parameter | None = None

    def hold(self, key: nn.Parameter, value: nn.Parameter) -> Prefix:
        """Take `key` and `value` as parameters of this prefix's own."""
        self.key, self.value = key, value
        return self

    def forward(self, at: At) -> KeyValues:
        """Return keys and values (1, H_kv, p, D)."""
        if self.key is None or self.value is None:
            key, value = at.prepared[at.site.name][:, None]
            return KeyValues(key, value)
        key = F.dropout(self.key, self.rate, self.training)
        value = F.dropout(self.value, self.rate, self.training)
        return KeyValues(key[None], value[None])

    def why_not(self) -> str:
        return "keys and values of a prefix take part in the softmax; no weight of the layer can hold them"


class Generator(nn.Module):
    """Z = W₂ tanh(W₁ E + b₁) + b₂ row by row: the keys and values of every site of one group.

    E (p, d), W₁ (m, d), b₁ (m,), W₂ (w, m), b₂ (w,); w = Σ over the sites 2·H_kv·D, laid out as
    (site, key | value, head, feature). `std` None: E ~ N(0, 1) and torch's default for linear
    layers; else E, W₁, W₂ ~ N(0, std²) and biases 0.
    """

    def __init__(
        self, sites: Sequence[AttentionSite], init: Init, length: int, hidden: int, std: float | None
    ) -> None:
        super().__init__()
        self.parts = [(s.name, s.kv_heads, s.head_dim) for s in sites]
        features, width = sites[0].features, sum(2 * heads * dim for _, heads, dim in self.parts)
        self.table = init.normal(length, features, std=1.0 if std is None else std)
        self.down, self.down_bias = linear(init, hidden, features, std)
        self.up, self.up_bias = linear(init, width, hidden, std)

    def forward(self) -> dict[str, Tensor]:
        """Return each site's keys and values (2, H_kv, p, D), by site name."""
        hidden = torch.tanh(F.linear(self.table, self.down, self.down_bias))
        rows = F.linear(hidden, self.up, self.up_bias)
        pieces = rows.split([2 * heads * dim for _, heads, dim in self.parts], dim=1)
        return {
            name: piece.unflatten(1, (2, heads, dim)).permute(1, 2, 0, 3)
            for (name, heads, dim), piece in zip(self.parts, pieces, strict=True)
        }


def linear(init: Init, rows: int, columns: int, std: float | None) -> tuple[nn.Parameter, nn.Parameter]:
    """Return a linear layer's starting weight (rows, columns) and bias (rows,)."""
    if std is not None:
        return init.normal(rows, columns, std=std), init.zeros(rows)
    return init.kaiming_uniform(rows, columns), init.uniform(rows, bound=columns**-0.5)


@dataclass(frozen=True)
class PrefixMethod(Method):
    """Base of the methods here: where prefixes stand, what makes them, and how a generator folds.

    What a generator gives moves with all its weights at once, so it takes a rate far below that
    of keys and values that are parameters themselves.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"attention"})
    default_targets: ClassVar[tuple[str, ...]] = ("attention",)
    generator_lr: ClassVar[float]
    flat_lr: ClassVar[float] = 5e-2
    weight_decay: ClassVar[float | None] = 0.0
    starts_as_identity: ClassVar[bool] = False

    length: int = setting(10, least=1)
    hidden: int = setting(512, least=1)
    dropout: float = setting(0.0, least=0, below=1)
    cross_prefix: bool = setting(True)
    encoder_prefix: bool = setting(True)

    @property
    def prepares(self) -> bool:  # type: ignore[override]
        """Whether a generator computes the prefixes once per call."""
        raise NotImplementedError

    @property
    def std(self) -> float | None:
        """Spread of the starting values; None is N(0, 1) for tables, torch's default for layers."""
        raise NotImplementedError

    def suits(self, site: Site) -> bool:
        if site.cross:
            return self.cross_prefix
        return self.encoder_prefix or site.side != "encoder"

    def unsuited(self) -> str:
        return "let cross_prefix and encoder_prefix allow what the targets name"

    @staticmethod
    @hookimpl
    def inject(method: PrefixMethod, sites: Sequence[AttentionSite], adapter: Adapter) -> int:  # type: ignore[override]
        generated = method.prepares and not adapter.data.get("folded")
        for group, members in groups(sites).items() if generated else ():
            init = adapter.init(members[0])
            adapter.share(group, Generator(members, init, method.length, method.hidden, method.std))
        for site in sites:
            prefix = Prefix(method.dropout)
            adapter.place(site, prefix if generated else prefix.hold(*rows(method, site, adapter.init(site))))
        return len(sites)

    @staticmethod
    @hookimpl
    def prepare(method: PrefixMethod, adapter: Adapter, call: Call) -> dict[str, Tensor]:
        return {
            site: F.dropout(pair, method.dropout, generator.training)
            for generator in adapter.shared.values()
            for site, pair in generator().items()
        }

    @staticmethod
    @hookimpl
    def parameter_groups(method: PrefixMethod, adapter: Adapter, lr: float | None) -> list[Group]:  # type: ignore[override]
        own = method.generator_lr if len(adapter.shared) else method.flat_lr
        return [Group(adapter.trainable_names(), own if lr is None else lr, method.weight_decay)]

    @staticmethod
    @hookimpl
    def stages(method: PrefixMethod, adapter: Adapter) -> list[Stage]:
        return [Stage("train", finish=drop_generators)] if len(adapter.shared) else []


def rows(method: PrefixMethod, site: AttentionSite, init: Init) -> tuple[nn.Parameter, nn.Parameter]:
    """Return a flat prefix's starting key and value (H_kv, p, D), N(0, std²)."""
    shape = (site.kv_heads, method.length, site.head_dim)
    std = 1.0 if method.std is None else method.std
    return init.normal(*shape, std=std), init.normal(*shape, std=std)


def groups(sites: Iterable[AttentionSite]) -> dict[str, list[AttentionSite]]:
    """Return the sites that share a generator: a stack's self-attention, or its cross-attention."""
    found: dict[str, list[AttentionSite]] = {}
    for site in sites:
        sort = "cross" if site.cross else "self"
        found.setdefault(f"{site.side}_{sort}" if site.side else sort, []).append(site)
    return found


def drop_generators(adapter: Adapter) -> None:
    """Give each prefix the values its generator makes without dropout, and let the generators go."""
    with torch.no_grad():
        values = {site: pair for g in adapter.shared.values() for site, pair in g().items()}
    for site, delta in adapter.placed:
        assert isinstance(delta, Prefix)
        delta.hold(*(nn.Parameter(half.clone()) for half in values[site.name]))
    adapter.shared.clear()
    adapter.data["folded"] = True
