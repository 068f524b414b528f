"""BitFit: training bias terms alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from inlay.authoring import ConfigError, Init, Method, ModuleSite, Shift, Site, setting

Term = Literal[
    "all", "query", "key", "value", "output", "gate", "up", "down", "norm", "embedding", "pooler"
]  # fmt: skip


@dataclass(frozen=True)
class BitFit(Method):
    """The model's own bias terms, as differences: b = b₀ + δ, δ = 0 at the start.

    `terms` chooses among them by role; "all" are those of linear layers and norms, of the norm
    behind the embeddings, of a pooler and a patch embedding. The paper's small variant is
    terms=["query", "up"]. The head is not among them: attach(..., train=("head",)).

    Parameters: the sizes of those biases, 7d + d_ff per BERT layer + 2d (embedding norm, pooler).
    No weight decay. arXiv 2106.10199, benzakenelad/BitFit. Differs: terms are roles, where the
    authors' match substrings ("output" there also means the feed-forward's down projection) and
    always add the pooler.
    """

    id: ClassVar[str] = "bitfit"
    paper: ClassVar[str] = "2106.10199"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "norm"})
    lr: ClassVar[float] = 4e-3
    weight_decay: ClassVar[float | None] = 0.0

    terms: tuple[Term, ...] = setting(("all",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.terms or (self.targets is not None and self.terms != ("all",)):
            raise ConfigError(
                "bitfit: terms choose where biases are, so give some, or targets instead",
                saw=f"terms={list(self.terms)}, targets={self.targets}",
                do='for example BitFit(terms=["query", "up"]), or BitFit(targets=["*.attention.*"])',
            )

    @property
    def default_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(term for term in self.terms if term != "all")

    @property
    def optional_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("linear", "norm", "embedding", "pooler") if "all" in self.terms else ()

    def suits(self, site: Site) -> bool:
        return isinstance(site, ModuleSite) and site.has_bias

    def unsuited(self) -> str:
        return "these layers have no bias terms; choose targets that have, or another method (ln_tuning, ia3)"

    def delta(self, site: Site, init: Init) -> Shift:
        assert isinstance(site, ModuleSite)
        return Shift(site, init, weight=False)
