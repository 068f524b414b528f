"""QA-LoRA: a low-rank change that is constant in each group of inputs, so that it folds into zero points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from inlay.authoring import At, ConfigError, Init, Site, setting
from inlay_lora.drawn import Gaussian, Kaiming, Orthogonal
from inlay_lora.factors import LowRank, LowRankMethod


class Pooled(LowRank):
    """Δy = s·(mean_g(x) Aᵀ) Bᵀ: `down` = A (r, in/g) reads the mean of each group of g inputs."""

    def __init__(self, site: Site, init: Init, method: QALoRA) -> None:
        self.group = method.group
        super().__init__(site, init, method, row=(site.in_features // method.group,))

    def pooled(self, x: Tensor) -> Tensor:
        """Return the means (*, in/g) of x (*, in)."""
        return x.unflatten(-1, (-1, self.group)).mean(-1)

    def effect(self, x: Tensor, at: At | None = None) -> Tensor:
        """Return s·(mean_g(x) Aᵀ) Bᵀ (*, out) of x (*, in)."""
        return super().effect(self.pooled(x))

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of x (*, in); what is dropped are means."""
        return self.completed(super().effect(self.dropped(self.pooled(x))), x, x, at)

    def steps(self, like: Tensor) -> Tensor:
        """Return what each group's weights change by, (s/g)·B A (out, in/g), in the dtype of `like`."""
        return super().product(like) / self.group

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in) in the dtype of `like`."""
        return self.steps(like).repeat_interleave(self.group, 1)

    def zeros(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the zero points (out, in/g) that hold this change, for W = scale·(codes − zero).

        `scale` and `zero` (out, in/g) are the base's, `scale` without 0s. Float32 or wider: rounded
        to integers they would round the change.
        """
        if scale.shape != (shape := (len(self.up), self.down.shape[1])) or zero.shape != shape:
            raise ConfigError(
                "qa_lora: these are not the scales and zero points of the layer's groups",
                saw=f"scale {tuple(scale.shape)}, zero {tuple(zero.shape)}",
                do=f"give one of each per output and group of {self.group} inputs: {shape}",
            )
        wide = scale.float() if scale.dtype.itemsize < 4 else scale
        return zero.to(wide.dtype) - self.steps(wide).detach() / wide


@dataclass(frozen=True)
class QALoRA(LowRankMethod):
    """Quantisation-aware LoRA: A reads means over groups of g inputs, the groups the base is quantised in.

        y = x Wᵀ + b + s·(drop(mean_g(x)) Aᵀ) Bᵀ,   A (r, in/g), B (out, r) = 0
        ΔW = (s/g)·B A, each column repeated g times

    Where W = scale·(codes − zero) with a scale and a zero per output and group of g inputs, the change
    moves the zeros alone: zero' = zero − (s/g)·B A / scale (`delta.zeros(scale, zero)`); codes and
    scales stay. Elsewhere it merges as any change of a weight.

    Parameters: r·(in/g + out) per layer. arXiv 2309.14717, yuhuixu1993/qa-lora. Differs: A starts
    Kaiming-uniform, U(±1/√(in/g)), as in huggingface/peft (authors: Xavier). peft multiplies the
    means by the number of groups: its s is in/g times this one. Groups are neighbouring inputs.
    """

    id: ClassVar[str] = "qa_lora"
    paper: ClassVar[str] = "2309.14717"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    default_targets: ClassVar[tuple[str, ...]] = ("linear",)
    lr: ClassVar[float] = 5e-3
    keeps_start: ClassVar[bool] = False

    group: int = setting(32, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.start, (Kaiming, Gaussian, Orthogonal)):
            raise ConfigError(
                "qa_lora: A reads means of inputs, for which no start is known",
                saw=f"start={self.start!r}",
                do="give one that only draws: kaiming(), gaussian(), orthogonal()",
            )

    def delta(self, site: Site, init: Init) -> Pooled:
        if site.in_features % self.group:
            sizes = [n for n in range(1, site.in_features + 1) if site.in_features % n == 0]
            raise ConfigError(
                "qa_lora: the inputs do not divide into groups",
                saw=f"group={self.group}, {site.name} reads {site.in_features}",
                do=f"give one of {', '.join(map(str, sizes))}: the quantiser's own",
            )
        return Pooled(site, init, self)
