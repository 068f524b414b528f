"""Starts drawn at random: Kaiming (the default), Gaussian, orthogonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from inlay.authoring import ConfigError, Init, setting
from inlay_lora.start import Factors, Layer, Start


@dataclass(frozen=True, kw_only=True)
class Kaiming(Start):
    """A₀ ~ U(±1/√in) (Kaiming-uniform with a=√5), B₀ = 0. arXiv 2106.09685, microsoft/LoRA."""

    id: ClassVar[str] = "kaiming"


@dataclass(frozen=True, kw_only=True)
class Gaussian(Start):
    """A₀ ~ N(0, 1/r²), B₀ = 0. arXiv 2106.09685, huggingface/peft."""

    id: ClassVar[str] = "gaussian"

    def factors(self, layer: Layer, init: Init) -> Factors:
        down = init.normal(layer.rank, *layer.row, std=1 / layer.rank)
        return down, init.zeros(layer.size[0], layer.rank)


@dataclass(frozen=True, kw_only=True)
class Orthogonal(Start):
    """A₀ and B₀ both at random, in orthogonal halves of the r directions: both learn from the first step.

        A₀ = Q₁ᵀ G_a / d,   B₀ = G_b Q₂ / d,   B₀A₀ = G_b (Q₂ Q₁ᵀ) G_a / d² = 0

    Q₁, Q₂ (r/2, r) the even and odd rows of an orthogonal matrix, G_a (r/2, in) and G_b (out, r/2) ~
    N(0, 1), d = `divisor`. The rank must be even. The product is zero up to rounding: in 16 bits that of
    its terms. No paper (a note by datta0); huggingface/peft, `init_lora_weights="orthogonal"`.
    """

    id: ClassVar[str] = "orthogonal"

    divisor: float = setting(10.0, above=0)

    def factors(self, layer: Layer, init: Init) -> Factors:
        rank, (out, width) = layer.rank, layer.size
        if rank % 2:
            raise ConfigError(
                "orthogonal: the rank must be even",
                saw=f"rank {rank} at {layer.name}",
                do=f"give {rank + 1}" + (f" or {rank - 1}" if rank > 1 else ""),
            )
        shapes = ((rank, rank), (rank // 2, width), (out, rank // 2))
        square, a, b = (init.normal(*shape).detach().float() for shape in shapes)
        turn = torch.linalg.qr(square).Q
        down = turn[0::2].T @ a / self.divisor
        return down, b @ turn[1::2] / self.divisor
