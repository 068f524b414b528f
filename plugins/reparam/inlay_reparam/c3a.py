"""C3A: a change made of circulant blocks, applied by Fourier transforms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.authoring import Init, LinearDelta, Method, Site, setting
from inlay_reparam.sizes import check_divides, divisors

USUAL = 256


class Circulant(LinearDelta):
    """Block (i, j) of ΔW is C_ij[l, q] = w_ij[(q − l) mod b] / in: `kernel` = w (out/b, in/b, b)."""

    def __init__(self, site: Site, kernel: nn.Parameter) -> None:
        super().__init__()
        self.kernel, self.scale = kernel, 1 / site.in_features

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in) by real Fourier transforms, in float32 or wider."""
        block = self.kernel.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        read = torch.fft.rfft(x.to(wide).unflatten(-1, (-1, block)))
        kernel = torch.fft.rfft(self.kernel.to(wide) * self.scale).conj()
        given = torch.einsum("...jf,ijf->...if", read, kernel)
        return torch.fft.irfft(given, n=block).flatten(-2).to(x.dtype)

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in) in the dtype of `like`."""
        place = torch.arange(self.kernel.shape[-1], device=like.device)
        blocks = self.kernel.to(like.dtype)[..., (place - place[:, None]) % len(place)]
        return self.scale * blocks.transpose(1, 2).flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class C3A(Method):
    """Circular convolution: full rank from one kernel per block.

        y = x Wᵀ + b + x ΔWᵀ,   block (i, j) of ΔW the circulant w_ij[(q − l) mod b] / in at (l, q)

    w (out/b, in/b, b). Applied as irfft(Σ_j conj(rfft(w_ij)) · rfft(x_j)) / in, in float32. The block
    size b divides in and out; none given: the largest that does, up to 256. init="xavier" draws
    w ~ U(±√(6/(in + out))), a start slightly off the base model; "kaiming" U(±1/√in), "gaussian"
    N(0, 1), "zeros" starts exactly at it.

    Parameters: in·out / b per layer. arXiv 2407.19342, huggingface/peft. Differs: the gradient is
    autograd's through the transforms (the authors' and peft's input gradient is wrong for b ≥ 3); real
    transforms, half the work; the kernels are of the base's dtype.
    """

    id: ClassVar[str] = "c3a"
    paper: ClassVar[str] = "2407.19342"
    lr: ClassVar[float] = 2e-1  # ΔW is divided by in

    block_size: int | None = setting(None, least=1)
    init: Literal["xavier", "zeros", "gaussian", "kaiming"] = setting("xavier")

    @property
    def starts_as_identity(self) -> bool:  # type: ignore[override]
        return self.init == "zeros"

    def block(self, site: Site) -> int:
        """Return the block size at a site."""
        if self.block_size is not None:
            check_divides("block_size", self.block_size, site, site.in_features, site.out_features)
            return self.block_size
        return max(n for n in divisors(site.in_features, site.out_features) if n <= USUAL)

    def delta(self, site: Site, init: Init) -> Circulant:
        block, rows, columns = self.block(site), site.out_features, site.in_features
        shape = (rows // block, columns // block, block)
        if self.init == "zeros":
            return Circulant(site, init.zeros(*shape))
        if self.init == "gaussian":
            return Circulant(site, init.normal(*shape))
        bound = math.sqrt(6 / (rows + columns)) if self.init == "xavier" else columns**-0.5
        return Circulant(site, init.uniform(*shape, bound=bound))
