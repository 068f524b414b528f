"""What adapters of this family are to other libraries: plain low-rank factors for the untouched base."""

from __future__ import annotations

from torch import nn

from inlay.authoring import ConfigError, Factored
from inlay.stack import need_state
from inlay_lora.factors import LowRank
from inlay_lora.lora import LowRankEmbedding


def plain(model: nn.Module, name: str = "default") -> dict[str, Factored]:
    """Return the change of each site as a plain LoRA's: s, A and B, by the site's name.

    From a start that is kept the rank is doubled, A' = [A; A − A₀] and B' = [B − B₀, B₀], with the same
    s: alpha' = 2·alpha, or √2·alpha with scaling="rsqrt". The product is that of [A; A₀] and [B, −B₀],
    but small differences stay exact in 16 bits. Biases are not part of it.
    """
    found: dict[str, Factored] = {}
    for placed in need_state(model).find(name):
        for site, delta in placed.adapter.placed:
            if not isinstance(delta, (LowRank, LowRankEmbedding)) or "y" in delta.reads:
                raise ConfigError(
                    "this change is no plain LoRA",
                    saw=f"{placed.path} at {site.name}: {type(delta).__name__}",
                    do="name an adapter or part of LoRA alone",
                )
            down, up = delta.pair(delta.down.dtype)
            found[site.name] = Factored(down.detach(), up.detach(), delta.scale)
    return found
