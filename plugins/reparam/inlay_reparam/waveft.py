"""WaveFT: a change of a weight made of a few learned wavelet coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import ConfigError, Init, Site, setting
from inlay_reparam.spectral import Grid, SpectralMethod

UNIT = 2.0**-53  # taps are kept as multiples of it: what a model is cast to leaves integers as they are


Taps = Sequence[Sequence[float]]


class Wavelet(Grid):
    """The inverse of one level of the 2-D wavelet transform of a padded (out, in) grid, cropped centrally.

    `taps` (2, 1, L): the filters of a reconstruction, low then high, in units of 2⁻⁵³. Along one
    dimension of n: L − 2 more entries, made even, hold n places in their middle; the first half go
    through the low filter, the rest through the high. Which filter runs along the rows is said by the
    half the *column* is in (the horizontal detail lies right of the approximation): `places` swaps halves.
    """

    def __init__(self, shape: tuple[int, int], count: int, seed: int, init: Init, taps: Taps) -> None:
        length = len(taps[0])
        self.padded = tuple((n + length - 1) // 2 * 2 for n in shape)
        super().__init__(shape, count, seed, init)
        whole = [[round(tap / UNIT) for tap in each] for each in taps]
        self.register_buffer("taps", torch.tensor(whole, device=init.device)[:, None], persistent=False)

    def places(self, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
        (height, width), (out, columns_of_x) = self.padded, self.shape
        rows, columns = rows + (height - out) // 2, columns + (width - columns_of_x) // 2
        along_rows = rows % (height // 2) + torch.where(2 * columns >= width, height // 2, 0)
        along_columns = columns % (width // 2) + torch.where(2 * rows >= height, width // 2, 0)
        return {"rows": along_rows, "columns": along_columns}

    def dense(self, values: Tensor) -> Tensor:
        full = values.new_zeros(self.padded).index_put((self.rows, self.columns), values)  # type: ignore[arg-type]
        return self.synthesis(self.synthesis(full, self.shape[1]).T, self.shape[0]).T

    def sparse(self, x: Tensor, values: Tensor) -> Tensor:
        picked = self.analysis(x, self.padded[1]).index_select(-1, self.columns) * values  # type: ignore[arg-type]
        full = x.new_zeros(*x.shape[:-1], self.padded[0]).index_add(-1, self.rows, picked)  # type: ignore[arg-type]
        return self.synthesis(full, self.shape[0])

    def synthesis(self, z: Tensor, size: int) -> Tensor:
        """Return (*, size) from coefficients (*, padded)."""
        found = F.conv_transpose1d(z.reshape(-1, 2, z.shape[-1] // 2), self.filters(z), stride=2)  # type: ignore[operator, union-attr]
        first = self.crop(size, z.shape[-1])
        return found[:, 0, first : first + size].reshape(*z.shape[:-1], size)

    def analysis(self, x: Tensor, padded: int) -> Tensor:
        """Return coefficients (*, padded) from (*, size): the adjoint of `synthesis`."""
        first = self.crop(x.shape[-1], padded)
        full = padded - 2 + self.taps.shape[-1]  # type: ignore[union-attr]
        x = F.pad(x, (first, full - first - x.shape[-1]))
        found = F.conv1d(x.reshape(-1, 1, full), self.filters(x), stride=2)  # type: ignore[operator, union-attr]
        return found.reshape(*x.shape[:-1], padded)

    def filters(self, like: Tensor) -> Tensor:
        """Return the taps (2, 1, L) in the dtype of `like`."""
        return self.taps.to(like.dtype) * UNIT  # type: ignore[operator, union-attr, return-value]

    def crop(self, size: int, padded: int) -> int:
        """Return where the centre begins in what `padded` coefficients give: their full convolution."""
        lost = self.taps.shape[-1] - 2  # type: ignore[union-attr]
        return lost + (padded - lost - size) // 2


@dataclass(frozen=True)
class WaveFT(SpectralMethod):
    """A weight's change as the inverse wavelet transform of n learned coefficients at fixed places.

        ΔW = scaling · idwt2(F),   F (out, in) = 0 but for n entries c at fixed places

    One level, zero-padded, quadrants of F as (approximation, horizontal; vertical, diagonal), the
    result cropped at its centre: huggingface/peft's layout, for any out and in. With "db1" each c_k
    writes a 2 × 2 patch of ±½. use_idwt=False: ΔW = scaling · F. Places as FourierFT's: the first of
    a permutation of out·in seeded with `seed`, never saved. c = 0, or N(0, 0.01²) with init="normal".
    proportional=True gives a layer n in proportion to its entries, the sum for all layers kept.

    Parameters: n per layer. arXiv 2505.12532. ΔW is formed only where n is more than out·in / 200.
    """

    id: ClassVar[str] = "waveft"
    paper: ClassVar[str] = "2505.12532"
    lr: ClassVar[float] = 1e-3

    spread: ClassVar[float] = 0.01

    n_frequency: int = setting(2592, least=1)
    scaling: float = setting(25.0, above=0)
    init: Literal["normal", "zeros"] = setting("zeros")
    wavelet: str = setting("db1")
    use_idwt: bool = setting(True)
    proportional: bool = setting(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.taps()

    def taps(self) -> Taps:
        """Return the low and high filter of the reconstruction."""
        import pywt

        if self.wavelet not in pywt.wavelist(kind="discrete"):
            raise ConfigError(
                "there is no discrete wavelet of that name",
                saw=f"wavelet={self.wavelet!r}",
                do="give one of pywt.wavelist(kind='discrete'), as 'db1', 'db4', 'sym4' or 'coif1'",
            )
        found = pywt.Wavelet(self.wavelet)
        return found.rec_lo, found.rec_hi

    def grid(self, shape: tuple[int, int], count: int, init: Init) -> Grid:
        plain = shape, count, self.seed, init
        return Wavelet(*plain, self.taps()) if self.use_idwt else Grid(*plain)

    def counts(self, sites: Sequence[Site]) -> list[int]:
        if not self.proportional:
            return super().counts(sites)
        sizes = [site.out_features * site.in_features for site in sites]
        each = self.n_frequency * len(sites) / sum(sizes)
        return [max(1, round(size * each)) for size in sizes]
