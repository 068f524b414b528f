"""Prefix tuning (Li and Liang 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from inlay.authoring import setting
from inlay_prefix.keyvalues import PrefixMethod


@dataclass(frozen=True)
class PrefixTuning(PrefixMethod):
    """p learned keys and values in front of every attention module's own.

        out = softmax(s·q·[K_P; K]ᵀ)·[V_P; V],   K_P, V_P (p, H_kv·D) per layer

    reparam=True: K_P and V_P of all layers come from one generator, Z = W₂ tanh(W₁ E + b₁) + b₂
    with E (p, d) ~ N(0, 1), W₁ (m, d) and W₂ (2·L·H_kv·D, m) started as torch starts linear layers,
    m = `hidden`; encoder self-, decoder self- and cross-attention have one each (`encoder_prefix`
    and `cross_prefix` leave theirs out). `fold` drops it after training. reparam=False: K_P and V_P
    are the parameters, ~ N(0, 1). `dropout` acts on Z. Keys are neither rotated nor normalised and
    tokens keep their positions (the authors' GPT-2 code shifts them by p, their BART code does not).

    Parameters per stack: p·d + (d + 1)·m + (m + 1)·2·L·H_kv·D; folded or flat: p·2·L·H_kv·D.
    arXiv 2101.00190, XiangLi1999/PrefixTuning. Left out: starting from the keys and values of real
    text, and the three-layer generator.
    """

    id: ClassVar[str] = "prefix_tuning"
    paper: ClassVar[str] = "2101.00190"
    generator_lr: ClassVar[float] = 1e-4
    lr: ClassVar[float] = generator_lr

    reparam: bool = setting(True)

    @property
    def prepares(self) -> bool:  # type: ignore[override]
        return self.reparam

    @property
    def std(self) -> float | None:
        return None
