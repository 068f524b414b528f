"""Serial adapters: bottlenecks behind a sublayer, as Houlsby et al. and Pfeiffer et al. place them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import (
    Adapter,
    At,
    Init,
    Method,
    Shift,
    Site,
    SublayerSite,
    TargetError,
    hookimpl,
    setting,
)
from inlay_adapter.bottleneck import Activation, Bottleneck, BottleneckMethod, Scale, Shape, Start

OWN: dict[str, dict[str, Any]] = {
    "houlsby": {"rank": 64, "act": "gelu_tanh", "init": "houlsby"},
    "pfeiffer": {"rank": None, "act": "relu", "init": "bert"},
}


class HoulsbyBottleneck(Bottleneck):
    """Δy = z(y): reads the sublayer's output y (B, T, d) itself."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (B, T, d) of y (B, T, d)."""
        return F.dropout(self.branch(y), self.rate, self.training)


class PfeifferBottleneck(Bottleneck):
    """Δy = z(LN(y + residual)): reads what the block would give, adds before the residual does.

    LN is the block's own norm behind the sum, which is thus applied twice; where there is none
    (pre-norm models) z reads the residual stream.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"y", "residual", "norm"})

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (B, T, d) of y (B, T, d)."""
        return F.dropout(self.branch(at.norm(y + at.residual)), self.rate, self.training)


@dataclass(frozen=True)
class SerialAdapter(BottleneckMethod):
    """A bottleneck behind sublayers; y the sublayer's output after its dropout, a the residual.

    placement="houlsby" (arXiv 1902.00751, google-research/adapter-bert): two per layer, behind
    attention and feed-forward, out = LN(a + y + z(y)); the layer norms learn too.
    placement="pfeiffer" (arXiv 2005.00247, adapter-hub/adapters): one per layer, behind the
    feed-forward, out = LN(a + y + z(LN(a + y))), the norm frozen; without a norm there,
    out = (a + y) + z(a + y).

        z(h) = s·(U σ(D h + b_D) + b_U),   D (r, d), U (d, r)

    None stands for the placement's own value: rank 64 | d // 16, act gelu_tanh | relu, init
    "houlsby" (truncated N(0, 0.01²)) | "bert" (N(0, 0.02²)), train_layernorms True | False. Biases
    start at 0; init="lora" (U = 0) starts exactly at the base model. `dropout` acts on z.

    Parameters: 2·layers·P(d, r) + every norm of the model | layers·P(d, r); P = 2dr + r + d.
    Norms learn as differences from the base's. Give "norm" among `targets` of your own to train
    them there as well. Two Pfeiffer adapters at one site form an onion, see docs.
    """

    id: ClassVar[str] = "serial_adapter"
    paper: ClassVar[str] = "1902.00751"

    placement: Literal["houlsby", "pfeiffer"] = setting("houlsby")
    rank: int | None = setting(None, least=1)
    act: Activation | None = setting(None)
    init: Start | None = setting(None)
    init_std: float | None = setting(None, least=0)
    scale: Scale = setting(1.0)
    dropout: float = setting(0.0, least=0, below=1)
    train_layernorms: bool | None = setting(None)

    def chosen(self, name: str) -> Any:
        """Return a setting, or where it is None the placement's own value."""
        value = getattr(self, name)
        return OWN[self.placement][name] if value is None else value

    @property
    def trains_norms(self) -> bool:
        """Whether layer norms learn: as asked, else under "houlsby" wherever the targets name them."""
        if self.train_layernorms is not None:
            return self.train_layernorms
        return self.placement == "houlsby" and (self.targets is None or "norm" in self.targets)

    @property
    def accepts(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"sublayer", "norm"} if self.trains_norms else {"sublayer"})

    @property
    def default_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        where = ("attention", "ffn") if self.placement == "houlsby" else ("ffn",)
        return (*where, "norm") if self.trains_norms else where

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        return bool(self.chosen("init") == "lora")

    def suits(self, site: Site) -> bool:
        reads_residual = self.placement == "pfeiffer" and isinstance(site, SublayerSite)
        return not reads_residual or site.residual is not None

    def unsuited(self) -> str:
        return 'use placement="houlsby": the residual that placement="pfeiffer" reads is not found there'

    def delta(self, site: Site, init: Init) -> Bottleneck | Shift:  # type: ignore[override]
        if not isinstance(site, SublayerSite):
            return Shift(site, init)  # type: ignore[arg-type]
        width = self.chosen("rank") or max(1, site.out_features // 16)
        shape = Shape(width, self.chosen("act"), self.chosen("init"), self.init_std, self.scale, self.dropout)
        kind = HoulsbyBottleneck if self.placement == "houlsby" else PfeifferBottleneck
        return kind(site, init, shape)

    @staticmethod
    @hookimpl
    def inject(method: SerialAdapter, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        kinds = {site.kind for site in sites}
        norms = method.trains_norms
        if "sublayer" not in kinds or (norms and "norm" not in kinds):
            raise TargetError(
                "the targets leave out what the settings ask for",
                saw=f"targets={method.targets}, train_layernorms={norms}; found {sorted(kinds)}",
                do='name "attention" or "ffn", and with train_layernorms=True also "norm"',
            )
        return Method.inject(method, sites, adapter)
