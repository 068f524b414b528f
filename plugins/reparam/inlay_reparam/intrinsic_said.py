"""Intrinsic SAID: every parameter moves in one random subspace of few dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.authoring import (
    Adapter,
    Change,
    ConfigError,
    Init,
    Method,
    ModuleSite,
    Ref,
    Site,
    WeightDelta,
    Weights,
    hookimpl,
    setting,
)  # fmt: skip
from inlay.authoring.projections import Dense, Fastfood, hadamard_matrix
from inlay.authoring.sparse import Place, distinct, places
from inlay.authoring.trained import shapes


class Subspace(nn.Module):
    """What all tensors share: `z` (d',) = 0 and `scales` = λ, one per tensor, = 1; without SAID no λ."""

    hadamard: Tensor

    def __init__(self, init: Init, size: int, tensors: int) -> None:
        super().__init__()
        self.z = init.zeros(size)
        self.scales = init.ones(tensors) if tensors else None
        self.register_buffer("hadamard", hadamard_matrix().to(init.device), persistent=False)

    def scaled(self, projected: Tensor, number: int) -> Tensor:
        """Return λ_i F_i(z)."""
        return projected if self.scales is None else projected * self.scales[number].to(projected.dtype)


PROJECTIONS: dict[str, type[Fastfood | Dense]] = {"fastfood": Fastfood, "dense": Dense}


class InSubspace(WeightDelta):
    """θ' = θ + λ_i F_i(z) for the site's weight and bias; a tied tensor has one F and λ for all its uses."""

    def __init__(self, space: Ref, parts: dict[str, tuple[int, nn.Module | Ref]]) -> None:
        super().__init__()
        self.space, self.numbers = space, {name: number for name, (number, _) in parts.items()}
        for name, (_, projection) in parts.items():
            setattr(self, name, projection)

    def forward(self, level: Weights) -> Change:
        """Return what is added to the site's tensors, in float32 or wider."""
        space: Any = self.space.module
        z = space.z.to(torch.promote_types(space.z.dtype, torch.float32))
        with torch.autocast(z.device.type, enabled=False):
            made = {
                name: space.scaled(getattr(self, name)(z, space.hadamard), n)
                for name, n in self.numbers.items()
            }
        return Change(**made)


@dataclass(frozen=True)
class IntrinsicSAID(Method):
    """All of a model's parameters moved in one random subspace: structure-aware intrinsic dimension.

        θ_i' = θ_i + λ_i F_i(z),   z (d',) = 0 shared by all tensors, λ_i = 1 of each, F_i fixed

    F = [H (G ∘ Π H (B ∘ z))]_{:D} / √(D Σ G²) (Fastfood; H Walsh-Hadamard, B signs, Π a permutation, G
    normal), with z cut for tensors of less than d' entries; or, with projection="dense", R z with
    R ~ N(0, 0.01²). They are made from `key` and not saved. said=False: no λ (DID). Targets: layers,
    norms and embeddings, weights and biases; the head is trained beside it (train=("head",)).

    Parameters: exactly d: with n tensors d' = d − n, and n λs. arXiv 2012.13255. Differs: the gradient
    is F's own, where the authors' Hadamard backward divides by √L each time, so that small tensors
    lead; a tied tensor counts once.
    """

    id: ClassVar[str] = "intrinsic_said"
    paper: ClassVar[str] = "2012.13255"
    accepts: ClassVar[frozenset[str]] = frozenset(
        {"linear", "conv1d", "conv", "embedding", "norm", "parameter"}
    )
    default_targets: ClassVar[tuple[str, ...]] = ("linear", "norm")
    optional_targets: ClassVar[tuple[str, ...]] = ("embedding", "pooler")
    lr: ClassVar[float] = 1e-3

    d: int = setting(20_000, least=1)
    said: bool = setting(True)
    projection: Literal["fastfood", "dense"] = setting("fastfood")
    key: int = setting(0, least=0)

    def suits(self, site: Site) -> bool:
        return not (site.kind == "embedding" and site.layer is not None)

    def unsuited(self) -> str:
        return "a table of relative positions has no rows to route; choose other targets"

    @staticmethod
    @hookimpl
    def inject(method: IntrinsicSAID, sites: Sequence[ModuleSite], adapter: Adapter) -> int:  # type: ignore[override]
        tensors = distinct(places(sites))
        numbers = {place.key: number for number, place in enumerate(tensors)}
        scales = len(tensors) if method.said else 0
        size = method.d - scales
        if size < 1:
            raise ConfigError(
                "intrinsic_said: d leaves no dimension beside the tensors' own scales",
                saw=f"d={method.d}, {len(tensors)} tensors",
                do=f"take d above {len(tensors)}, or said=False",
            )
        space = adapter.share("said", Subspace(adapter.init(shared="said"), size, scales))
        maps = {place.key: projection(method, place, adapter, size) for place in tensors}
        firsts = {place.label for place in tensors}
        for site in sites:
            parts: dict[str, tuple[int, nn.Module | Ref]] = {}
            for place in places([site]):
                found = maps[place.key] if place.label in firsts else Ref(maps[place.key])
                parts[place.name] = numbers[place.key], found
            adapter.place(site, InSubspace(space, parts))
        return len(sites)


def projection(method: IntrinsicSAID, place: Place, adapter: Adapter, size: int) -> nn.Module:
    """Return F_i of one tensor: of a name and a key alone, the same for every adapter."""
    init = adapter.init(like=place.site.reference, shared=place.label, seed=method.key)
    weight, bias = shapes(place.site)
    return PROJECTIONS[method.projection](init, weight if place.name == "weight" else bias, size)
