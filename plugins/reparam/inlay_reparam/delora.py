"""DeLoRA: a low-rank change whose directions are normalised and whose strength is one learned number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from inlay.authoring import (
    Adapter,
    Factored,
    Group,
    Init,
    Method,
    ModuleSite,
    Site,
    hookimpl,
    read,
    setting,
    two_rates,
    wide,
)
from inlay_reparam.sharing import FactoredDelta
from inlay_reparam.sizes import check_rank

LEAST = 1e-4  # of a norm that is divided by


class Bounded(FactoredDelta):
    """ΔW = (λ / r)·B Ξ A·ν: `down` = A (r, in), `up` = B (out, r), `strength` = λ (1,), `norms` = ν (in,)."""

    def __init__(self, site: ModuleSite, init: Init, method: DeLoRA) -> None:
        super().__init__()
        rank, self.rate = method.rank, method.dropout
        self.down = init.kaiming_uniform(rank, site.in_features)
        shape = (site.out_features, rank)
        self.up = init.zeros(*shape) if method.start == "zero" else init.kaiming_uniform(*shape)
        self.strength = init.full(1, value=method.strength)
        self.register_buffer("norms", init.tensor(read(site)[0].norm(dim=0)).data)
        self.subtracts = method.start == "random"
        if self.subtracts:
            for name in ("down", "up", "strength"):
                self.register_buffer(f"first_{name}", getattr(self, name).detach().clone(), persistent=False)

    def factors(self, like: Tensor, first: str = "") -> Factored:
        """Return A·ν (r, in) and (λ / r)·B Ξ (out, r), as they are or as they first were."""
        down, up, strength, norms = (
            wide(getattr(self, n)) for n in (f"{first}down", f"{first}up", f"{first}strength", "norms")
        )
        sizes = down.norm(dim=1).clamp(min=LEAST) * up.norm(dim=0).clamp(min=LEAST)
        up = up * (strength / len(down) / sizes)
        return Factored((down * norms).to(like.dtype), up.to(like.dtype))

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in), ΔW not formed."""
        change = super().effect(x)
        return change - self.factors(x, "first_").effect(x) if self.subtracts else change

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in)."""
        change = super().product(like)
        return change - self.factors(like, "first_").dense(like) if self.subtracts else change


@dataclass(frozen=True)
class DeLoRA(Method):
    """Low rank with bounded strength: what learns are directions, and one number per layer for their size.

        ΔW = (λ / r)·B Ξ A·diag(ν),   Ξ_ii = 1 / (‖A_i‖ ‖B_·i‖),   ν_j = ‖W_·j‖ of the frozen weight

    A (r, in), B (out, r), norms clamped at 1e-4, λ (1,) = strength: ‖ΔW diag(ν)⁻¹‖ ≤ λ whatever A and
    B are. start="random" (the paper's): both Kaiming-uniform, and the change they make at first is
    subtracted for good. start="zero" (peft's): A Kaiming-uniform, B = 0, whose first step then jumps
    to full strength. Both start at the base.

    Parameters: r·(in + out) + 1, ν is saved beside them. arXiv 2503.18225, ExplainableML/DeLoRA and
    huggingface/peft. λ learns at strength_lr_ratio times the rate. Differs from peft: ν of a quantised
    weight is that of the weight its bits stand for, and never 1 for want of a weight.
    """

    id: ClassVar[str] = "delora"
    paper: ClassVar[str] = "2503.18225"
    lr: ClassVar[float] = 5e-3

    rank: int = setting(8, least=1)
    strength: float = setting(15.0, above=0)
    start: Literal["random", "zero"] = setting("random")
    dropout: float = setting(0.0, least=0, below=1)
    strength_lr_ratio: float = setting(1.0, above=0)

    def delta(self, site: Site, init: Init) -> Bounded:
        assert isinstance(site, ModuleSite)
        check_rank(self, site, min(site.in_features, site.out_features))
        return Bounded(site, init, self)

    @staticmethod
    @hookimpl
    def parameter_groups(method: DeLoRA, adapter: Adapter, lr: float | None) -> Sequence[Group]:  # type: ignore[override]
        return two_rates(method, adapter, lr, ".strength", method.strength_lr_ratio, 0.0)
