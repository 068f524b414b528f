"""A low-rank change with a weight for each of its ranks: what the methods of this family are built on."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from inlay.authoring import ConfigError, LinearDelta, Site


class Ranked(LinearDelta):
    """Δy = ((drop(x) Aᵀ) ⊙ c) Bᵀ: `down` = A (r, in), `up` = B (out, r), and c (r,) from `weights`."""

    down: Tensor
    up: Tensor

    def weights(self) -> Tensor:
        """Return c (r,), the method's scale in it."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r)."""
        return self.down, self.up

    def effect(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ (*, out) of x (*, in), in x's dtype."""
        down, up = (factor.to(x.dtype) for factor in self.factors())
        return F.linear(F.linear(x, down) * self.weights().to(x.dtype), up)

    def product(self, like: Tensor) -> Tensor:
        """Return ΔW = B diag(c) A (out, in) in the dtype of `like`."""
        down, up, c = (tensor.to(like.dtype) for tensor in (*self.factors(), self.weights()))
        return (up * c) @ down


def check_rank(method: str, rank: int, site: Site) -> None:
    """Raise if the rank is larger than a change of the site's weight can have."""
    if rank > (most := min(site.in_features, site.out_features)):
        raise ConfigError(
            f"{method}: the rank is larger than a layer's",
            saw=f"rank {rank} at {site.name}, {site.in_features} to {site.out_features} features",
            do=f"give at most {most}, or leave the layer out of the targets",
        )
