"""LoRA-FA: LoRA with its down factor frozen, so that little is kept for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from inlay.authoring import Init, Site, setting
from inlay_lora.drawn import Gaussian, Kaiming, Orthogonal
from inlay_lora.factors import LowRank, LowRankMethod

DELTA = 1e-8  # added to the diagonal of A Aᵀ


class FrozenDown(LowRank):
    """Δy = s·(x Aᵀ) Bᵀ with `down` = A (r, in) a buffer: only `up` = B (out, r) learns.

    Autograd keeps u = x Aᵀ (*, r) and not x, as nothing that learns reads x.
    """

    def __init__(self, site: Site, init: Init, method: LoRAFA) -> None:
        super().__init__(site, init, method)
        down = self.down.detach()
        del self.down
        self.register_buffer("down", down, persistent=not method.redrawn)
        self.corrected = method.corrected

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r), or B − B₀ from a start that is kept: A stays A₀."""
        up = Corrected.apply(self.up, self.down, self.scale) if self.corrected else self.up
        return self.down.to(dtype), (up if self.up_start is None else up - self.up_start).to(dtype)


class Corrected(torch.autograd.Function):
    """B itself, whose gradient g becomes (1/s²)·g (A Aᵀ + δI)⁺ on its way back.

    s·(that)·A is what of the weight's full gradient lies in A's rows, over s². Linear in g: sums over
    batches, uses and devices may be taken before or after it.
    """

    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, scale: float) -> Tensor:
        """Return B (out, r)."""
        ctx.save_for_backward(down)
        ctx.scale = scale
        return up.view_as(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the corrected gradient (out, r), computed in float32 or wider."""
        (down,) = ctx.saved_tensors
        wide = torch.promote_types(down.dtype, torch.float32)
        with torch.autocast(down.device.type, enabled=False):
            rows = down.to(wide)
            gram = rows @ rows.T + DELTA * torch.eye(len(rows), dtype=wide, device=rows.device)
            corrected = torch.linalg.solve_ex(gram, gradient.to(wide), left=False).result / ctx.scale**2
        return corrected.to(gradient.dtype), None, None


@dataclass(frozen=True)
class LoRAFA(LowRankMethod):
    """LoRA with A frozen where it starts: half the parameters, and r / in of the activations kept.

        y = x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ,   A (r, in) frozen, B (out, r) = 0

    Only u = x Aᵀ is kept for the backward pass, not x (dropout keeps a mask besides). `corrected`
    replaces the gradient g of B by (1/s²)·g (A Aᵀ + δI)⁻¹, δ = 1e-8: the change of the weight that it
    makes is then the full gradient's least-squares approximation in A's rows; without it this is the
    paper's first version. A comes from `key` and the layer's name and is in no file, so adapters of
    one key share it; an A found from data or weights (`start`) is saved.

    Parameters: r·out per layer. arXiv 2308.03303; the correction as in huggingface/peft's optimizer,
    but on the gradient itself and in float32, so that any optimizer and loop has it. Left out:
    embeddings and convolutions.
    """

    id: ClassVar[str] = "lora_fa"
    paper: ClassVar[str] = "2308.03303"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    lr: ClassVar[float] = 5e-3

    corrected: bool = setting(True)
    key: int = setting(0, least=0)

    @property
    def redrawn(self) -> bool:
        """Whether A can be drawn again, so that no file need hold it."""
        return isinstance(self.start, (Kaiming, Gaussian, Orthogonal))

    def delta(self, site: Site, init: Init) -> FrozenDown:
        return FrozenDown(site, init.seeded(f"{self.key}/{site.name}"), self)
