"""Prompt tuning: learned rows in front of the token sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.authoring import At, Init, Method, SequenceDelta, SequenceSite, setting


class Prompt(SequenceDelta):
    """Rows P (p, d) at the positions before the first token's."""

    def __init__(self, rows: nn.Parameter) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, at: At) -> Tensor:
        """Return P (p, d)."""
        return self.rows


@dataclass(frozen=True)
class PromptTuning(Method):
    """p learned rows P (p, d) in front of the embedded tokens: X = [P; E].

    init="vocabulary": embeddings of p different tokens among the first 5000; "uniform": U(-0.5, 0.5).
    Parameters: p·d. arXiv 2104.08691. On rotary decoders, where tokens keep positions 0 … T−1, P has
    −p … −1, and the first token is not predicted from P.
    """

    id: ClassVar[str] = "prompt_tuning"
    paper: ClassVar[str] = "2104.08691"
    accepts: ClassVar[frozenset[str]] = frozenset({"sequence"})
    default_targets: ClassVar[tuple[str, ...]] = ("embedding",)
    lr: ClassVar[float] = 0.01
    weight_decay: ClassVar[float | None] = 0.0
    starts_as_identity: ClassVar[bool] = False

    length: int = setting(100, least=1)
    init: Literal["vocabulary", "uniform"] = setting("vocabulary")

    def delta(self, site: SequenceSite, init: Init) -> Prompt:  # type: ignore[override]
        if self.init == "uniform":
            return Prompt(init.uniform(self.length, site.features, bound=0.5))
        pool = torch.randperm(min(5000, site.embedding.num_embeddings), generator=init.generator)
        ids = pool.repeat(-(-self.length // len(pool)))[: self.length]
        return Prompt(init.tensor(site.embedding(ids.to(site.reference.device))))
