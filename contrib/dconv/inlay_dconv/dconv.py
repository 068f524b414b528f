"""DConv: a causal convolution of each channel of a projection over the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inlay.authoring import At, Init, Method, OutputDelta, Site, setting
from inlay.errors import StateError


class CausalConv(OutputDelta):
    """Δy_t = Σ_j w_j ⊙ y_(t−j) over the tokens up to t: `taps` = w (k, out), zero at the start.

    Padding counts as zeros. A chunk that comes through a cache is preceded by what the store kept.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, site: Site, init: Init, size: int) -> None:
        super().__init__()
        self.taps = init.zeros(size, site.out_features)
        # An encoder's tokens all come in one call; so do those that cross-attention's keys and values read.
        self.chunked = site.side != "encoder" and not (site.cross and site.role in ("key", "value"))

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy of y (B, T, out), or of y (B, out), each row a sequence of one token."""
        if y.dim() == 2:
            return self.taps[0].to(y.dtype) * y
        real, back = at.real(y), len(self.taps) - 1
        y, length = y if real is None else y * real.unsqueeze(-1), y.shape[1]
        behind = torch.cat((self.before(y, back, at), y), dim=1)
        if self.chunked:
            at.store["end"], at.store["values"] = self.past(at) + length, behind
        taps = self.taps.to(y.dtype)
        return torch.stack([tap * behind[:, back - j :][:, :length] for j, tap in enumerate(taps)]).sum(0)

    def before(self, y: Tensor, back: int, at: At) -> Tensor:
        """Return the `back` values (B, back, out) in front of y; a cache may have dropped its last tokens."""
        past = self.past(at)
        if past == 0:
            return y.new_zeros(y.shape[0], back, y.shape[2])
        end, values = at.store.get("end", 0), at.store.get("values", y[:, :0])
        stop = values.shape[1] - (end - past)
        if not back <= stop <= values.shape[1]:
            raise StateError(
                "the cache was filled while the convolution was not active",
                saw=f"{at.site.name}: {past} tokens in the cache, {end} seen by it",
                do="start the generation with the adapter active, or generate with use_cache=False",
            )
        return values[:, stop - back : stop]

    def past(self, at: At) -> int:
        """Return how many tokens of this sequence earlier calls brought."""
        return at.call.past_length if self.chunked and at.call is not None else 0


@dataclass(frozen=True, kw_only=True)
class DConv(Method):
    """A causal depthwise convolution behind each query, key and value projection.

        y'_t = y_t + Σ_j w_j ⊙ y_(t−j),   j = 0 … k−1,   w (k, out) = 0

    Parameters: k·out per site. After the multi-dconv-head attention of Primer (So et al. 2021,
    arXiv 2109.08668), which trains it with the model, in the place of y; here it is a change that
    starts at the base. Mixes tokens, so it cannot be merged into the weights.
    """

    id: ClassVar[str] = "dconv"
    paper: ClassVar[str] = "2109.08668"
    default_targets: ClassVar[tuple[str, ...]] = ("query", "key", "value")
    lr: ClassVar[float] = 5e-3
    reads_call: ClassVar[bool] = True

    size: int = setting(3, least=1, most=16)

    def delta(self, site: Site, init: Init) -> CausalConv:
        return CausalConv(site, init, self.size)
