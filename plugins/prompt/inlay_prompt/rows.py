"""Rows: virtual tokens that are parameters, and what the methods here have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from inlay.authoring import At, Method, SequenceDelta


class Rows(SequenceDelta):
    """Virtual tokens P (p, d) that are parameters."""

    def __init__(self, rows: nn.Parameter | None) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, at: At) -> Tensor:
        """Return P (p, d)."""
        assert self.rows is not None
        return self.rows

    def why_not(self) -> str:
        return "virtual tokens are read beside the text; no weight of the model can hold them"


@dataclass(frozen=True)
class PromptMethod(Method):
    """Base of the methods here: virtual tokens stand in front of what a stack of blocks reads."""

    accepts: ClassVar[frozenset[str]] = frozenset({"sequence"})
    default_targets: ClassVar[tuple[str, ...]] = ("embedding",)
    weight_decay: ClassVar[float | None] = 0.0
    starts_as_identity: ClassVar[bool] = False
