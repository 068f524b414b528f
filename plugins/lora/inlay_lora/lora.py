"""LoRA: a low-rank change beside a frozen layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import At, ConfigError, Init, ModuleSite, OutputDelta, Site
from inlay_lora.factors import LowRank, LowRankMethod, check_rank
from inlay_lora.start import Layer


class LowRankEmbedding(OutputDelta):
    """Δe(t) = s·A[:, t] Bᵀ: `down` = A (r, V) starts at 0, `up` = B (d, r) as N(0, 1).

    Times the constant that some embeddings multiply their rows by. The padding row never learns.
    """

    def __init__(self, site: ModuleSite, init: Init, method: LowRankMethod) -> None:
        super().__init__()
        _check_table(site, method)
        self.down = init.zeros(method.r, site.in_features)
        self.up = init.normal(site.out_features, method.r)
        self.scale, self.output_scale = method.scale, site.output_scale
        self.padding: int | None = site.module.padding_idx  # type: ignore[assignment]

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A (r, V) and B (d, r)."""
        return self.down.to(dtype), self.up.to(dtype)

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, d) of token ids x (*)."""
        rows = F.embedding(x, self.down.T, self.padding)
        return F.linear(rows * (self.scale * self.output_scale), self.up).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return E + s (B A)ᵀ for the table E (V, d)."""
        down, up = self.pair(weight.dtype)
        return weight + self.scale * (up @ down).T, bias


def _check_table(site: ModuleSite, method: LowRankMethod) -> None:
    """Raise unless the method's settings mean something for an embedding's table."""
    check_rank(method.id, Layer(site, method.r, method.scale))
    start = method.start
    if start.kept or not start.starts_as_identity:
        raise ConfigError(
            f"{start.id}: this start is for layers, not for embeddings",
            saw=f"{site.name}, a table of {site.in_features} rows",
            do="leave it out of the targets, or choose another start",
        )
    if method.bias == "own":
        raise ConfigError(
            f"{method.id}: an embedding takes no bias",
            saw=f'{site.name} among the targets, bias="own"',
            do="leave it out of the targets, or the bias out",
        )


class LowRankConv(LowRank):
    """Δy = s·B * (A * drop(x)): the kernel A (r, in/groups, *k) runs as the layer's does, B as one of size 1.

    With groups all of them share A, each has its own rows of B.
    """

    def __init__(self, site: ModuleSite, init: Init, method: LowRankMethod) -> None:
        weight: Any = site.module.weight
        super().__init__(site, init, method, row=tuple(weight.shape[1:]))

    def run(self, x: Tensor, down: Tensor, up: Tensor, at: At | None = None) -> Tensor:
        """Return s·B * (A * x) (B, out, …) of x (B, in, …)."""
        assert at is not None
        conv: Any = at.site.module
        inner = conv._conv_forward(x, torch.cat([down] * conv.groups), None) * self.scale
        return CONVOLVE[x.dim() - 3](inner, up.view(*up.shape, *(1,) * (x.dim() - 2)), groups=conv.groups)

    def spread(self, bias: Tensor) -> Tensor:
        return bias.view(-1, *(1,) * (self.down.dim() - 2))


CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class LoRA(LowRankMethod):
    """A trainable low-rank matrix beside each frozen weight.

        y = x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ,   A (r, in), B (out, r)

    s = alpha / rank; with scaling="rsqrt" alpha / √rank (rsLoRA, arXiv 2312.03732). Linear layers
    and Conv1D: A Kaiming-uniform (a=√5), B = 0, unless `start` says otherwise. A role that is a
    slice of a fused projection has factors of its own. Embeddings: e(t) + s·A[:, t] Bᵀ with
    A (r, V) = 0 and B (d, r) ~ N(0, 1), no dropout, the padding row untouched. Convolutions:
    A (r, in/groups, *kernel) runs in the layer's own stride and padding, B (out, r) after it.

    Parameters: r·(in + out) per layer; r·(V + d) per embedding; r·(in/groups·|kernel| + out) per
    convolution; with bias="own" out more per layer, with "layer" out where it has a bias. arXiv
    2106.09685, microsoft/LoRA and huggingface/peft. Parameters are of the base's dtype (peft: float32).
    """

    id: ClassVar[str] = "lora"
    paper: ClassVar[str] = "2106.09685"
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "embedding"})
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    lr: ClassVar[float] = 2e-3

    def delta(self, site: Site, init: Init) -> OutputDelta:
        if site.kind == "embedding":
            assert isinstance(site, ModuleSite)
            return LowRankEmbedding(site, init, self)
        if site.kind == "conv":
            assert isinstance(site, ModuleSite)
            return LowRankConv(site, init, self)
        return LowRank(site, init, self)
