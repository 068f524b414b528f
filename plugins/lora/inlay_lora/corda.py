"""CorDA: the factors start along what the layer makes of its inputs, most of it or least."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.authoring import ConfigError, Site, calls, rows, setting
from inlay_lora.inputs import Inputs
from inlay_lora.start import Factors, Layer, Start, split

MOST_ERROR = 0.05  # ‖C C⁻¹ − I‖ that the inverse may have


class Moment:
    """C = (1/N) Σ XᵀX (in, in), the sum over samples X (m, in), each over its largest absolute entry."""

    def __init__(self, site: Site) -> None:
        self.total, self.samples = torch.zeros(site.in_features, site.in_features), 0

    def update(self, rows: Tensor) -> None:
        rows = rows.float()
        rows = rows / rows.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        self.total, self.samples = self.total.to(rows.device) + rows.T @ rows, self.samples + 1

    def damped(self, damp: float) -> tuple[Tensor, Tensor]:
        """Return C + d·mean(diag C)·I and its inverse; d is doubled until the inverse is one."""
        moment = self.total / self.samples
        eye = torch.eye(len(moment), device=moment.device)
        while True:
            damped = moment + damp * moment.diagonal().mean() * eye
            inverse = torch.linalg.inv(damped)
            if float((damped @ inverse - eye).norm()) < MOST_ERROR:
                return damped, inverse
            damp *= 2


@dataclass(frozen=True, kw_only=True)
class CorDA(Start):
    """Context-oriented decomposition: W split along the second moment C of what the layer reads.

        W C = U S Vᵀ,   B₀ = U_r √(S_r/s),   A₀ = √(S_r/s) V_rᵀ C⁻¹,   W' = W + s·(B A − B₀A₀)

    mode="ipm" takes the r largest singular values: learn what matters most on this data. "kpm" takes
    the smallest: learn what touches least of the knowledge that the data asks for. C is gathered one
    sample at a time, padding left out, and damped by `damp` of its mean diagonal (doubled until C can be
    inverted). The authors take 256 samples of 2,048 tokens, and alpha = rank. It needs in² numbers in
    float32 per layer while it measures.

    arXiv 2406.05223, iboing/CorDA. Differs: the base stays, and (A₀, B₀) is kept beside (A, B); a
    sample is divided by its largest absolute entry (there: the absolute value of its largest).
    """

    id: ClassVar[str] = "corda"
    calibrates: ClassVar[bool] = True
    kept: ClassVar[bool] = True

    mode: Literal["ipm", "kpm"] = setting("ipm")
    damp: float = setting(0.01, above=0)

    def measure(self, layers: Sequence[Layer], model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
        self.check_called(layers)
        inputs = Inputs([layer.site for layer in layers], Moment, start=self.id, label_mask=False)
        with inputs.watching():
            for call in calls(model, batches):
                for sample in rows(call):
                    inputs.run(model, sample)
        inputs.check_all_read()
        found: dict[str, Tensor] = {}
        for layer in layers:
            down, up = self.along(layer, inputs.found[layer.name])
            found |= self.named(layer, down, up)
        return found

    def along(self, layer: Layer, moment: Moment) -> Factors:
        """Return A₀ and B₀ of a layer."""
        if not bool(moment.total.any()):
            raise ConfigError(
                "corda: a layer reads nothing but zeros",
                saw=layer.name,
                do="give other data, or leave it out of the targets",
            )
        damped, inverse = moment.damped(self.damp)
        left, singular, right = torch.linalg.svd(layer.weight().float() @ damped, full_matrices=False)
        r = slice(None, layer.rank) if self.mode == "ipm" else slice(len(singular) - layer.rank, None)
        return split(left[:, r], singular[r], right[r] @ inverse, layer.scale)
