"""LN tuning: training the gains and biases of normalisation layers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from inlay.authoring import ConfigError, Init, Method, ModuleSite, Shift, Site, setting


@dataclass(frozen=True)
class LNTuning(Method):
    """The norms' own gain and bias, as differences.

        y = (γ₀ + δγ) ⊙ norm(x) + (β₀ + δβ),   δγ, δβ (d,) = 0 at the start

    Norms are found by type; those on single heads (q_norm, k_norm) are left out. Outside the blocks,
    one whose path names an embedding is an embedding norm, any other a final norm.

    Parameters: 2d per LayerNorm, d per RMSNorm. No weight decay. arXiv 2211.08682 and 2312.11420.
    """

    id: ClassVar[str] = "ln_tuning"
    paper: ClassVar[str] = "2211.08682"
    accepts: ClassVar[frozenset[str]] = frozenset({"norm"})
    default_targets: ClassVar[tuple[str, ...]] = ("norm",)
    lr: ClassVar[float] = 4e-3
    weight_decay: ClassVar[float | None] = 0.0

    terms: tuple[Literal["weight", "bias"], ...] = setting(("weight", "bias"))
    include_embedding_norm: bool = setting(True)
    include_final_norm: bool = setting(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.terms:
            raise ConfigError("ln_tuning: nothing would learn", saw="terms=[]", do='terms=["weight", "bias"]')

    def suits(self, site: Site) -> bool:
        assert isinstance(site, ModuleSite)
        if site.layer is None and not self._outer(site.name):
            return False
        return "weight" in self.terms or site.has_bias

    def _outer(self, name: str) -> bool:
        """Whether a norm outside the blocks is wanted."""
        return self.include_embedding_norm if "embed" in name else self.include_final_norm

    def unsuited(self) -> str:
        return 'have "weight" among the terms (these norms may lack a bias); include norms outside the blocks'

    def delta(self, site: Site, init: Init) -> Shift:
        assert isinstance(site, ModuleSite)
        return Shift(site, init, weight="weight" in self.terms, bias="bias" in self.terms)
