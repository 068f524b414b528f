"""KAdaptation: a sum of Kronecker products whose small factors all layers share."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from inlay.authoring import Adapter, At, Init, LinearDelta, Method, ModuleSite, Ref, Site, hookimpl, setting
from inlay_reparam.sizes import check_divides


class Slow(nn.Module):
    """The factors of S_i = p_i t_iᵀ, i = 1…n: `p`, `t` (n, n) ~ U(±0.01), a row each."""

    def __init__(self, init: Init, n: int) -> None:
        super().__init__()
        self.p, self.t = init.uniform(n, n, bound=0.01), init.uniform(n, n, bound=0.01)


class Bias(nn.Module):
    """A learned bias c (out,) = 0 of the sites of one layer."""

    def __init__(self, init: Init, size: int) -> None:
        super().__init__()
        self.bias = init.zeros(size)


class SharedKronecker(LinearDelta):
    """ΔWᵀ = s·Σ_i S_i ⊗ (u_i v_i): `u` (n, in/n, k) Glorot-uniform (gain √2), `v` (n, k, out/n) = 0.

    With S_i = p_i t_iᵀ that is a product of rank n·k, of rows p_i ⊗ u_i and columns t_i ⊗ v_i.
    """

    def __init__(self, site: Site, init: Init, method: KAdaptation, slow: Ref, bias: Bias | Ref) -> None:
        super().__init__()
        n, k = method.n, method.rank
        fast_in, fast_out = site.in_features // n, site.out_features // n
        self.u = init.uniform(n, fast_in, k, bound=math.sqrt(2) * math.sqrt(6 / (fast_in + k)))
        self.v = init.zeros(n, k, fast_out)
        self.slow, self.shared, self.scale, self.rate = slow, bias, method.scale, method.dropout

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (down (n·k, in), up (out, n·k)) with ΔW = up·down, in the dtype of `like`."""
        p, t, u, v = (a.to(like.dtype) for a in (self.slow.module.p, self.slow.module.t, self.u, self.v))
        down = p[:, None, :, None] * u.mT[:, :, None, :]  # (i, k, n, in/n)
        up = t[:, None, :, None] * v[:, :, None, :]  # (i, k, n, out/n)
        return self.scale * down.flatten(2).flatten(0, 1), up.flatten(2).flatten(0, 1).mT

    def bias(self, like: Tensor) -> Tensor:
        """Return c (out,) in the dtype of `like`."""
        owner = self.shared.module if isinstance(self.shared, Ref) else self.shared
        return owner.bias.to(like.dtype)  # type: ignore[union-attr, operator, no-any-return]

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        """Return Δy (*, out) of x (*, in); in training with dropout on the entries of ΔW."""
        if self.training and self.rate:
            return F.linear(x, F.dropout(self.product(x), self.rate), self.bias(x))
        down, up = self.factors(x)
        return F.linear(F.linear(x, down), up, self.bias(x))

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW (out, in) in the dtype of `like`."""
        down, up = self.factors(like)
        return up @ down

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (W + ΔW, b + c)."""
        own = self.bias(weight)
        return weight + self.product(weight), own if bias is None else bias + own


@dataclass(frozen=True)
class KAdaptation(Method):
    """A sum of Kronecker products: slow factors shared by all layers, fast ones of each.

        y = x (W + ΔW)ᵀ + b + c,   ΔWᵀ = s·Σ_{i=1…n} S_i ⊗ (u_i v_i),   S_i = p_i t_i (n, n)

    p_i (n, 1) and t_i (1, n) ~ U(±0.01), one set for each role; u_i (in/n, k) Glorot-uniform with
    gain √2, v_i (k, out/n) = 0 at each site; c (out,) = 0, one for the sites of a layer of that size.
    k = `rank`, s = `scale`; `dropout` drops entries of ΔW in training.

    Parameters: 2n² per role, k·(in + out) per site, out per layer. ViT-B: 50,176. arXiv 2203.16329.
    Follows the paper, not eric-ai-lab/PEViT, whose factors never learn: both fast ones start at 0 there,
    the value's are not used, and the change is added to heads and tokens in another order.
    """

    id: ClassVar[str] = "kadaptation"
    paper: ClassVar[str] = "2203.16329"
    lr: ClassVar[float] = 3e-3

    n: int = setting(32, least=1)
    rank: int = setting(1, least=1)
    scale: float = setting(160.0, above=0)
    dropout: float = setting(0.5, least=0, below=1)

    @staticmethod
    @hookimpl
    def inject(method: KAdaptation, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        slow: dict[str, Ref] = {}
        biases: dict[Hashable, Bias] = {}
        for site in sites:
            check_divides("n", method.n, site, site.in_features, site.out_features)
            if site.role not in slow:
                name = f"slow_{site.role or 'all'}"
                slow[site.role] = adapter.share(name, Slow(adapter.init(shared=name), method.n))
            init, layer = adapter.init(site), layer_of(site)
            bias: Bias | Ref = Ref(biases[layer]) if layer in biases else Bias(init, site.out_features)
            if isinstance(bias, Bias):
                biases[layer] = bias
            adapter.place(site, SharedKronecker(site, init, method, slow[site.role], bias))
        return len(sites)


def layer_of(site: Site) -> Hashable:
    """Return what sites that share a bias have in common; outside the blocks each has its own."""
    if site.layer is None or (isinstance(site, ModuleSite) and site.expert is not None):
        return site.name
    return site.side, site.cross, site.layer, site.out_features
