"""P-tuning v2 (Liu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from inlay.authoring import setting
from inlay_prefix.keyvalues import PrefixMethod


@dataclass(frozen=True)
class PTuningV2(PrefixMethod):
    """p learned keys and values in front of every attention module's own, for understanding tasks.

        out = softmax(s·q·[K_P; K]ᵀ)·[V_P; V],   K_P, V_P (H_kv, p, D) per layer

    The keys and values are parameters, ~ N(0, 0.02²), with `dropout` on them in training; with
    prefix_projection=True they come from a generator W₂ tanh(W₁ E + b₁) + b₂ whose E (p, d),
    W₁ (m, d) and W₂ start the same way, biases 0, m = `hidden`, dropped by `fold`. The classifier
    learns too: `inlay.attach(model, PTuningV2(), train=("head",))`.

    Parameters: p·2·L·H_kv·D (+ head); with projection p·d + (d + 1)·m + (m + 1)·2·L·H_kv·D.
    arXiv 2110.07602, THUDM/P-tuning-v2. 0.02 is what that code runs with: its N(0, 1) tables are
    drawn again by the Transformers it pins. It shifts positions by p; here tokens keep theirs.
    """

    id: ClassVar[str] = "p_tuning_v2"
    paper: ClassVar[str] = "2110.07602"
    generator_lr: ClassVar[float] = 1e-3
    lr: ClassVar[float] = PrefixMethod.flat_lr

    length: int = setting(4, least=1)
    dropout: float = setting(0.1, least=0, below=1)
    prefix_projection: bool = setting(False)

    @property
    def prepares(self) -> bool:  # type: ignore[override]
        return self.prefix_projection

    @property
    def std(self) -> float | None:
        return 0.02
