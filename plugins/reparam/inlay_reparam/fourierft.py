"""FourierFT: a change of a weight made of a few learned frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inlay.authoring import Init
from inlay_reparam.spectral import Grid, SpectralMethod


class Fourier(Grid):
    """ΔW[p, q] = Σ_k c_k cos(2π (u_k p / out + v_k q / in)) / (out·in), the real part of the inverse FFT.

    cos is even, so (u, v) stands for (−u, −v) too: u ≤ out/2 and real transforms suffice. Then
    y = irfft of Σ_k c_k X̄[v_k] at u_k, with X the transform of x. `weights` (n, 2) are those of its real and
    imaginary part: ½ beside a mirrored entry, −1 for a conjugate, no imaginary part at 0 and out/2.
    """

    worth: ClassVar[int] = 512

    def places(self, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
        out, width = self.shape
        rows, columns = (
            torch.where(2 * rows > out, out - rows, rows),
            torch.where(2 * rows > out, -columns % width, columns),
        )
        edge = (rows == 0) | (2 * rows == out)
        real = torch.where(edge, 1.0, 0.5)
        imaginary = torch.where(edge, 0.0, torch.where(2 * columns > width, 0.5, -0.5))
        return {
            "rows": rows,
            "columns": columns,
            "near": torch.minimum(columns, -columns % width),
            "weights": torch.stack([real, imaginary], -1),
        }

    def dense(self, values: Tensor) -> Tensor:
        at = (self.rows, self.columns)  # (u, v) and (−u, −v) may both be chosen: their coefficients add up
        full = values.new_zeros(self.shape).index_put(at, values, accumulate=True)  # type: ignore[arg-type]
        return torch.fft.ifft2(full).real

    def sparse(self, x: Tensor, values: Tensor) -> Tensor:
        weights = values[:, None] * self.weights.to(values.dtype)  # type: ignore[operator, union-attr]
        seen = torch.view_as_real(torch.fft.rfft(x, norm="forward"))
        picked = seen.index_select(-2, self.near) * weights  # type: ignore[arg-type]
        spectrum = x.new_zeros(*x.shape[:-1], self.shape[0] // 2 + 1, 2).index_add(-2, self.rows, picked)  # type: ignore[arg-type]
        return torch.fft.irfft(torch.view_as_complex(spectrum), n=self.shape[0])


@dataclass(frozen=True)
class FourierFT(SpectralMethod):
    """A weight's change as the inverse Fourier transform of n learned coefficients at fixed frequencies.

        ΔW = scaling · Re ifft2(F),   F (out, in) = 0 but for F[u_k, v_k] = c_k

    The n places are the first of a random permutation of out·in seeded with `seed`, the same for all
    layers of one shape, and never saved. init="normal": c ~ N(0, 1), which changes the model from
    the start (entries of ΔW have std scaling·√(n/2) / (out·in)); init="zeros" starts at the base.
    ΔW is formed only where n is more than out·in / 512: fewer frequencies act on the transform of x.

    Parameters: n per layer. arXiv 2405.03003, Chaos96/fourierft; places drawn as in huggingface/peft.
    """

    id: ClassVar[str] = "fourierft"
    paper: ClassVar[str] = "2405.03003"
    lr: ClassVar[float] = 5e-2

    def grid(self, shape: tuple[int, int], count: int, init: Init) -> Grid:
        return Fourier(shape, count, self.seed, init)
