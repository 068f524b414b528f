"""HiWi: an adapter that reads parameters instead of activations, and is thrown away after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import (
    Adapter,
    Change,
    ConfigError,
    Factored,
    Init,
    Method,
    ModuleSite,
    Site,
    Stage,
    WeightDelta,
    Weights,
    hookimpl,
    setting,
)  # fmt: skip

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class ParameterAdapter(WeightDelta):
    """θ' = θ + f(θ D) U: `down` = Dᵀ (r, out) ~ U(±1/√out), `up` = Uᵀ (out, r) = 0; θ = b, or rows of Wᵀ.

    After `hold`, θ' = θ + `shift`: the difference alone, shaped like θ.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __init__(self, site: Site, init: Init, method: HiWi) -> None:
        super().__init__()
        self.of_bias, self.act = method.target == "bias", method.act
        self.down: nn.Parameter | None = init.kaiming_uniform(method.rank, site.out_features)
        self.up: nn.Parameter | None = init.zeros(site.out_features, method.rank)
        self.shift: nn.Parameter | None = None

    def hold(self, shift: nn.Parameter) -> ParameterAdapter:
        """Take `shift`, shaped like θ, in the place of D and U."""
        self.down, self.up, self.shift, self.reads = None, None, shift, frozenset()  # type: ignore[misc]
        return self

    def change(self, level: Weights) -> Tensor | Factored:
        """Return θ' − θ: (out,), or (out, in) as a product of rank r."""
        if self.down is None or self.up is None:
            assert self.shift is not None
            return self.shift
        act = ACTIVATIONS[self.act]
        if not self.of_bias:
            return Factored(act(self.down.to(level.weight.dtype) @ level.weight), self.up)
        bias = level.bias
        assert bias is not None
        return F.linear(act(F.linear(bias, self.down.to(bias.dtype))), self.up.to(bias.dtype))

    def forward(self, level: Weights) -> Change:
        """Return what is added to the layer's bias (out,) or weight (out, in)."""
        return Change(bias=self.change(level)) if self.of_bias else Change(self.change(level))  # type: ignore[arg-type]


@dataclass(frozen=True)
class HiWi(Method):
    """An adapter on the parameters themselves, which leaves nothing but their new values.

        θ' = θ + f(θ D) U,   D (out, r), U (r, out),   θ = b as a row, or Wᵀ (in, out) row by row

    f = ReLU (or act="gelu"); D ~ U(±1/√out), U = 0, no biases of its own; target="bias" (the default)
    or "weight". When training is over, `fold` (or `inlay.advance`) keeps θ' − θ alone: what is saved
    from then on is out numbers per layer (in·out for weights), whatever r was. Before that D and U are
    saved, to go on training.

    Parameters: 2r·out per layer; folded: out (in·out for weights). arXiv 2305.16742, which has no code:
    f, D's start and the orientation for weights are this package's reading.
    """

    id: ClassVar[str] = "hiwi"
    paper: ClassVar[str] = "2305.16742"
    default_targets: ClassVar[tuple[str, ...]] = ("up", "down")
    lr: ClassVar[float] = 5e-3

    target: Literal["bias", "weight"] = setting("bias")
    rank: int = setting(16, least=1)
    act: Literal["relu", "gelu"] = setting("relu")

    @staticmethod
    @hookimpl
    def inject(method: HiWi, sites: Sequence[ModuleSite], adapter: Adapter) -> int:  # type: ignore[override]
        if method.target == "bias":
            need_biases(sites)
        for site in sites:
            init = adapter.init(site)
            delta = ParameterAdapter(site, init, method)
            if adapter.data.get("folded"):
                rows, columns = site.out_features, site.in_features
                delta.hold(init.zeros(rows) if method.target == "bias" else init.zeros(rows, columns))
            adapter.place(site, delta)
        return len(sites)

    @staticmethod
    @hookimpl
    def stages(method: HiWi, adapter: Adapter) -> list[Stage]:
        return [] if adapter.data.get("folded") else [Stage("train", finish=drop_adapters)]


def need_biases(sites: Sequence[ModuleSite]) -> None:
    """Raise if a layer has no bias, or one that is 0 everywhere, naming them."""
    zero = "has a bias that is 0, from which f(0 D) U learns nothing"
    for what, lacks in (("has no bias to adapt", lambda s: not s.has_bias), (zero, is_zero)):
        if wrong := [site.name for site in sites if lacks(site)]:
            raise ConfigError(
                f"hiwi: a layer {what}",
                saw=f"{', '.join(wrong[:4])}{', …' if len(wrong) > 4 else ''} ({len(wrong)} of {len(sites)})",
                do='choose targets with trained biases, or HiWi(target="weight")',
            )


def is_zero(site: ModuleSite) -> bool:
    """Whether the layer's bias is known and 0 everywhere."""
    bias = site.tensor(site.bias_name)
    return bias is not None and not bias.is_meta and not bool(site.cut(bias).any())


def drop_adapters(adapter: Adapter) -> None:
    """Give each delta the difference θ' − θ that its D and U make, and let them go."""
    for site, delta in adapter.placed:
        assert isinstance(delta, ParameterAdapter)
        assert delta.down is not None
        with torch.no_grad():
            level = adapter.below(site)
            made = delta.change(level)
            made = made.dense(level.weight) if isinstance(made, Factored) else made
            delta.hold(nn.Parameter(made.to(delta.down)))
    adapter.data["folded"] = True
