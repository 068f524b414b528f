"""Starting points of low-rank factors: one strategy each, given to a method as `start=`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.authoring import ConfigError, Init, ModuleSite, Site, Strategy, read

DOWN, UP = "down", "up"
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layer:
    """What a start may know of a layer: where it is, its rank r, s, and the shape that a row of A has."""

    site: Site
    rank: int
    scale: float
    row: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def size(self) -> tuple[int, int]:
        """(out, in) of the weight as a matrix; a kernel's rows are flat."""
        return self.site.out_features, math.prod(self.row) if self.row else self.site.in_features

    @property
    def called(self) -> bool:
        """Whether it is a linear layer that is a module of its own, whose calls show what it reads."""
        return isinstance(self.site, ModuleSite) and self.site.is_linear and self.site.called

    def weight(self) -> Tensor:
        """Return W (out, in) in float32 or wider, dequantised, as a matrix."""
        assert isinstance(self.site, ModuleSite)
        return read(self.site)[0].detach().flatten(1)


@dataclass(frozen=True, kw_only=True)
class Start(Strategy):
    """Where the factors A (r, in) and B (out, r) of a low-rank method start.

    A subclass with an `id` is a starting point: `LoRA(start=EVA())`, as text `lora(start=eva())`. One
    that draws, or looks at the layer's weight, gives `factors`; one that `calibrates` sees data before
    the adapter is placed and gives `measure`. `kept` says that B₀A₀ is not zero and comes from the base:
    the change is then s·(B A − B₀A₀), the start kept beside the factors, and the base stays as it is.
    `starts_as_identity` is false where B₀A₀ is meant to change the output. `from_weight` says that
    `factors` needs the weight's values: it is not asked where a file's values come instead.
    """

    calibrates: ClassVar[bool] = False
    kept: ClassVar[bool] = False
    starts_as_identity: ClassVar[bool] = True
    from_weight: ClassVar[bool] = False

    def factors(self, layer: Layer, init: Init) -> Factors:
        """Return A₀ (r, in), a kernel's rows flat or not, and B₀ (out, r); here Kaiming-uniform and zero."""
        return init.kaiming_uniform(layer.rank, *layer.row), init.zeros(layer.size[0], layer.rank)

    def measure(
        self, layers: Sequence[Layer], model: nn.Module, batches: Iterable[Any]
    ) -> Mapping[str, Tensor]:
        """Return A₀ of layers as "<name>.down" and B₀ (zero if left out) as "<name>.up".

        Their rank may differ from the layer's, and a layer of rank 0 is left out. A layer without an
        A₀ starts as `factors` says.
        """
        raise NotImplementedError

    def named(self, layer: Layer, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """Return a layer's factors under the names that `measure` gives them."""
        return {f"{layer.name}.{DOWN}": down, f"{layer.name}.{UP}": up}

    def check_called(self, layers: Iterable[Layer]) -> None:
        """Raise unless all are linear layers whose own calls show what they read."""
        for layer in layers:
            if not layer.called:
                raise ConfigError(
                    f"{self.id}: this start is for linear layers that are modules of their own",
                    saw=f"{layer.name} ({layer.site.kind})",
                    do="leave it out of the targets, or choose another start",
                )


def split(left: Tensor, singular: Tensor, right: Tensor, scale: float) -> Factors:
    """Return A = √(S/s)·R (r, in) and B = L·√(S/s) (out, r), so that s·B A = L S R."""
    root = (singular / scale).sqrt()
    return root[:, None] * right, left * root


def best(matrix: Tensor, rank: int, scale: float = 1.0) -> Factors:
    """Return A (r, in) and B (out, r) for which s·B A is nearest to a matrix (out, in)."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    return split(left[:, :rank], singular[:rank], right[:rank], scale)


def principal(
    matrix: Tensor, rank: int, niter: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first `rank` (or all) of U (out, r), S (r,), Vᵀ (r, in), in `niter` subspace iterations.

    Randomised, as in arXiv 0909.4061, from `generator` alone: the same on every device.
    """
    rank = min(rank, *matrix.shape)
    rows = torch.randn(rank, matrix.shape[0], generator=generator).to(matrix)
    basis = torch.linalg.qr((rows @ matrix).T).Q
    for _ in range(niter):
        basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q
    left, singular, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return left[:, :rank], singular[:rank], (right @ basis.T)[:rank]
