"""LoftQ: on a base in few bits, the factors start as what the bits lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors import safe_open
from torch import Tensor

from inlay.authoring import ConfigError, Init, ModuleSite, setting
from inlay_lora.start import Factors, Layer, Start, best


@dataclass(frozen=True, kw_only=True)
class LoftQ(Start):
    """Quantisation-aware start: the factors make up for what the base lost in few bits.

        W − deq(Q) ≈ U_r S_r V_rᵀ,   B₀ = U_r √(S_r/s),   A₀ = √(S_r/s) V_rᵀ

    `weights` is the file or folder of safetensors that the quantised base was made from; W is read from
    there, layer by layer, deq(Q) from the base as it is. The output at the start is nearer to the full
    model's than the base's is. arXiv 2310.08659, yxli2123/LoftQ with T = 1. Differs: s is divided out,
    so that alpha need not be the rank. T > 1 changes the base: see `alternate`.
    """

    id: ClassVar[str] = "loftq"
    starts_as_identity: ClassVar[bool] = False
    from_weight: ClassVar[bool] = True

    weights: str = setting()

    def factors(self, layer: Layer, init: Init) -> Factors:
        site = layer.site
        if not isinstance(site, ModuleSite) or not site.quantised:
            raise ConfigError(
                "loftq: the layer is not in few bits, so there is nothing to make up for",
                saw=f"{layer.name} ({site.kind})",
                do="load the base in 4 or 8 bits first, or choose another start, such as PiSSA()",
            )
        lossy = layer.weight()
        full = site.cut(_full(self.weights, site.name.partition("[")[0]))
        if full.shape != lossy.shape:
            raise ConfigError(
                "loftq: a full weight is not of the layer's shape",
                saw=f"{layer.name}: {tuple(full.shape)} in the file, {tuple(lossy.shape)} in the base",
                do="give the weights that this base was made from",
            )
        error = full.to(lossy) - lossy
        return best(error, layer.rank, layer.scale)


def alternate(
    weight: Tensor, rank: int, quantise: Callable[[Tensor], Tensor], *, steps: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Q, A, B) after `steps` rounds of Q = quantise(W − B A), (A, B) = SVD of W − Q.

    `quantise` returns its argument as the few bits act, dequantised. For a base made from this Q,
    `LoftQ(weights=...)` with the full weights gives this A and B (up to √s).
    """
    rest = weight
    for _ in range(steps):
        lossy = quantise(rest)
        down, up = best(weight - lossy, rank)
        rest = weight - up @ down
    return lossy, down, up


def _full(weights: str, name: str) -> Tensor:
    """Return the weight of the module `name` from a file or folder of safetensors."""
    path = Path(weights)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    wanted, near = f"{name}.weight", dict[str, Path]()
    for file in files:
        with safe_open(file, "pt") as opened:
            keys = set(opened.keys())
            if wanted in keys:
                return opened.get_tensor(wanted)  # type: ignore[no-any-return]
            near |= {k: file for k in keys if wanted.endswith(f".{k}") or k.endswith(f".{wanted}")}
    if len(near) != 1:
        raise ConfigError(
            "loftq: the full weight of a layer is not to be found",
            saw=f"{wanted} in {len(files)} files at {weights!r}",
            do="give the file or folder of safetensors that the quantised base was made from",
        )
    ((key, file),) = near.items()
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key)  # type: ignore[no-any-return]
