"""Full-size differences of the base's tensors: full fine-tuning as an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from inlay.authoring.trained import Shift, Trained
from inlay.method import Method
from inlay.settings import setting

if TYPE_CHECKING:
    from inlay.adapter import Init
    from inlay.sites import Site


@dataclass(frozen=True)
class Dense(Method):
    """Full-size differences of the base's own tensors: W' = W + δ, b' = b + δ_b, both 0 at the start.

    Full fine-tuning as an adapter: it can be stacked, routed, detached and combined like any other.
    With `new_biases` layers without a bias get one. Parameters: as many as the targets hold. What
    `inlay.combine` makes of adapters that differ in method.
    """

    id: ClassVar[str] = "dense"
    accepts: ClassVar[frozenset[str]] = Trained.accepts
    default_targets: ClassVar[tuple[str, ...]] = ("linear",)
    lr: ClassVar[float] = 1e-4

    new_biases: bool = setting(False)

    def delta(self, site: Site, init: Init) -> Shift:
        return Shift(site, init, anew=self.new_biases)  # type: ignore[arg-type]
