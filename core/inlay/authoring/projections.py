"""Fixed random linear maps from a small vector to a tensor of any shape, made from a seed and never saved."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.adapter import Init

SIDE = 64


def hadamard_matrix(size: int = SIDE) -> Tensor:
    """Return Sylvester's H (size, size) of ±1, size a power of 2: every corner (m, m) of it is one too."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def transform(v: Tensor, matrix: Tensor) -> Tensor:
    """Return H v for v (L,), L a power of 2: unnormalised, H H = L·I, and its own gradient's transform.

    H is the Kronecker product of small ones, so it acts by log₆₄ L products with `matrix` (64, 64).
    """
    done, size = 1, v.numel()
    while done < size:
        side = min(len(matrix), size // done)
        v = (matrix[:side, :side].to(v.dtype) @ v.view(-1, side, done)).reshape(-1)
        done *= side
    return v


class Fastfood(nn.Module):
    """F(z) = [H (G ∘ Π H (B ∘ z))]_{:D} / √(D Σ G²): `signs` = B, `order` = Π, `gains` = G, of a seed.

    z is padded with 0 to L = 2^⌈log₂ D⌉, or cut. Of padding H makes repetitions: H (B ∘ z) is
    that of the first m numbers, m ≥ d' a power of 2, again and again, so Π points into those.
    """

    signs: Tensor
    order: Tensor
    gains: Tensor

    def __init__(self, init: Init, shape: tuple[int, ...], space: int) -> None:
        super().__init__()
        self.shape, self.size = shape, math.prod(shape)
        length = power_of_two(self.size)
        read = min(space, length)
        self.repeats = min(power_of_two(read), length)
        draw, g = drawn(init), init.generator
        signs = draw(lambda: torch.randint(0, 2, (read,), generator=g) * 2.0 - 1, read)
        order = draw(lambda: torch.randperm(length, generator=g) % self.repeats, length)
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("order", order.int(), persistent=False)
        self.register_buffer(
            "gains", draw(lambda: torch.randn(length, generator=g), length), persistent=False
        )

    def forward(self, z: Tensor, matrix: Tensor) -> Tensor:
        """Return F(z), shaped like the tensor it moves, of z (d',)."""
        signs, gains = self.signs.to(z.dtype), self.gains.to(z.dtype)
        head = F.pad(z[: len(signs)] * signs, (0, self.repeats - len(signs)))
        mixed = transform(head, matrix).index_select(0, self.order)
        spread = transform(mixed * gains, matrix)[: self.size]
        return (spread / (self.size * gains.square().sum()).sqrt()).view(self.shape)


class Dense(nn.Module):
    """F(z) = R z: `matrix` = R (D, d') ~ N(0, 0.01²), of a seed."""

    matrix: Tensor

    def __init__(self, init: Init, shape: tuple[int, ...], space: int) -> None:
        super().__init__()
        self.shape = shape
        drawn_matrix = init.normal(math.prod(shape), space, std=0.01).data
        self.register_buffer("matrix", drawn_matrix, persistent=False)

    def forward(self, z: Tensor, matrix: Tensor) -> Tensor:
        """Return F(z), shaped like the tensor it moves, of z (d',)."""
        return (self.matrix.to(z.dtype) @ z).view(self.shape)


def power_of_two(size: int) -> int:
    """Return the least power of 2 that is not less than `size`."""
    return 1 << (size - 1).bit_length()


def drawn(init: Init) -> Callable[[Callable[[], Tensor], int], Tensor]:
    """Return what draws a vector where `init` makes tensors; on meta its length alone counts."""
    if init.device.type == "meta":
        return lambda make, length: torch.empty(length, device="meta")
    return lambda make, length: make().to(init.device)
