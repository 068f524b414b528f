"""What adapters do to the weights of their layers, as tensors: what methods with a weight form share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.compile import apart
from inlay.delta import Fold
from inlay.errors import CannotMerge, ConfigError
from inlay.method import chain
from inlay.registry import registry
from inlay.sites import ModuleSite
from inlay.stack import Placed
from inlay.weights import read


@dataclass(frozen=True)
class Difference:
    """ΔW and Δb (None: no change) at one site, in float64; ΔW is (out, in), or shaped as folds see it."""

    site: ModuleSite
    weight: Tensor
    bias: Tensor | None


def differences(parts: Sequence[Placed]) -> dict[str, Difference]:
    """Return what one adapter's parts, innermost first, do to the base's weights, by site.

    Exact up to the rounding of float64, whatever the methods, their scalings and options. Raises
    `ConfigError` where a part has no weight form, or parts act on one layer in a way that has no sum.
    """
    _check_apart(parts)
    folds: dict[str, tuple[ModuleSite, Fold]] = {}
    for placed in parts:
        for site, fold in _folds(placed).items():
            below = folds.get(site.name)
            folds[site.name] = (site, fold if below is None else chain(below[1], fold))
    with torch.no_grad():
        return {name: _difference(site, fold) for name, (site, fold) in folds.items()}


def _folds(placed: Placed) -> Mapping[ModuleSite, Fold]:
    placed.adapter.recall()
    try:
        found: Mapping[ModuleSite, Fold] = registry.call("merge", placed.method, adapter=placed.adapter)
    except CannotMerge as error:
        raise ConfigError(
            f"{placed.path!r} is no change of weights that could be computed with",
            saw=error.saw,
            do='combine adapters of one stack tensor by tensor: how="tensors"',
        ) from None
    return found


def _difference(site: ModuleSite, fold: Fold) -> Difference:
    weight, bias = read(site)
    weight, bias = weight.double(), None if bias is None else bias.double()
    changed, shifted = fold(weight, bias)
    if shifted is not None and bias is not None:
        shifted = shifted - bias
    return Difference(site, changed - weight, shifted if shifted is not None and shifted.any() else None)


def _check_apart(parts: Sequence[Placed]) -> None:
    """Raise if changes of overlapping parts of a fused layer do not commute: they have no sum by site."""
    modules: dict[nn.Module, list[tuple[Placed, ModuleSite, bool]]] = {}
    for placed in parts:
        for site, delta in placed.adapter.placed:
            for other, beside, additive in modules.setdefault(site.module, []):
                if beside.name != site.name and not apart(beside, site) and not (additive and delta.additive):
                    raise ConfigError(
                        "two changes of one layer overlap and do not commute",
                        saw=f"{other.path!r} at {beside.name} and {placed.path!r} at {site.name}",
                        do="give both the same targets",
                    )
            modules[site.module].append((placed, site, delta.additive))  # type: ignore[arg-type]
