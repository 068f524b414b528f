"""Changes given by some entries of a transformed weight: the grid they lie on, and what they do to x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import (
    Adapter,
    Init,
    LinearDelta,
    Method,
    Ref,
    Site,
    hookimpl,
    setting,
    wide,
)
from inlay_reparam.sizes import check_most, shown


class Grid(nn.Module):
    """n places of an (out, in) matrix, the first of a seeded permutation, and its transform to a weight.

    Never saved: `rows` (n,), `columns` (n,), one copy for all layers of one shape that have as many.
    """

    worth: ClassVar[int] = 200  # entries of ΔW that cost what one place costs per token, as measured

    def __init__(self, shape: tuple[int, int], count: int, seed: int, init: Init) -> None:
        super().__init__()
        self.shape, self.few = shape, count * self.worth <= shape[0] * shape[1]
        rows = columns = torch.empty(count, dtype=torch.long, device="meta")
        if init.device.type != "meta":
            order = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count]
            rows, columns = order // shape[1], order % shape[1]
        for name, tensor in self.places(rows, columns).items():
            self.register_buffer(name, tensor.to(init.device), persistent=False)

    def places(self, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
        """Return the buffers of this transform, given where the entries lie in the (out, in) matrix."""
        return {"rows": rows, "columns": columns}

    def dense(self, values: Tensor) -> Tensor:
        """Return ΔW (out, in) of the entries (n,)."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values)  # type: ignore[arg-type]

    def sparse(self, x: Tensor, values: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in), place by place."""
        picked = x.index_select(-1, self.columns) * values  # type: ignore[arg-type]
        return x.new_zeros(*x.shape[:-1], self.shape[0]).index_add(-1, self.rows, picked)  # type: ignore[arg-type]


class Spectral(LinearDelta):
    """ΔW = the transform of `spectrum` (n,) on a shared grid, computed in float32 or wider."""

    def __init__(self, spectrum: nn.Parameter, grid: Ref, scaling: float) -> None:
        super().__init__()
        self.spectrum, self.grid, self.scaling = spectrum, grid, scaling

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in); ΔW is formed only if its entries are many."""
        grid = self.grid.module
        if not grid.few:
            return F.linear(x, self.product(x))
        with torch.autocast(x.device.type, enabled=False):
            return grid.sparse(wide(x), self.values(wide(x))).to(x.dtype)

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in)."""
        return self.grid.module.dense(self.values(wide(like))).to(like.dtype)

    def values(self, like: Tensor) -> Tensor:
        """Return the scaled entries (n,) in the dtype of `like`."""
        return self.spectrum.to(like.dtype) * self.scaling


@dataclass(frozen=True)
class SpectralMethod(Method):
    """Settings of n entries at the first places of a permutation seeded with `seed`; `spread`: of a start."""

    spread: ClassVar[float] = 1.0

    n_frequency: int = setting(1000, least=1)
    scaling: float = setting(150.0, above=0)
    init: Literal["normal", "zeros"] = setting("normal")
    seed: int = setting(777, least=0)

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        return self.init == "zeros"

    def grid(self, shape: tuple[int, int], count: int, init: Init) -> Grid:
        """Return the grid of layers of one shape."""
        raise NotImplementedError

    def counts(self, sites: Sequence[Site]) -> list[int]:
        """Return how many entries each site gets."""
        return [self.n_frequency] * len(sites)

    @staticmethod
    @hookimpl
    def inject(method: SpectralMethod, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        grids: dict[str, Ref] = {}
        for site, count in zip(sites, method.counts(sites), strict=True):
            shape = (site.out_features, site.in_features)
            check_most("n_frequency", count, shape[0] * shape[1], shown(site))
            name, init = f"grid_{shape[0]}x{shape[1]}_{count}", adapter.init(site)
            if name not in grids:
                grids[name] = adapter.share(name, method.grid(shape, count, init))
            start = init.normal(count, std=method.spread) if method.init == "normal" else init.zeros(count)
            adapter.place(site, Spectral(start, grids[name], method.scaling))
        return len(sites)
