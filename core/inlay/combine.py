"""Combining adapters into a new one: by what they do to the weights, or tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from inlay.adapter import Adapter
from inlay.attach import place, start
from inlay.authoring.dense import Dense
from inlay.authoring.trained import Shift
from inlay.differences import Difference, differences
from inlay.errors import ConfigError, shown
from inlay.lowrank import low_rank
from inlay.plan import build_adapter
from inlay.registry import registry
from inlay.stack import Placed, State

Keep = Callable[[Tensor, float, torch.Generator], Tensor]
Join = Callable[[Tensor, Tensor], Tensor]


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    how: str = "linear",
    rank: int | None = None,
    density: float = 0.2,
    seed: int = 0,
    activate: bool = False,
    trainable: bool = False,
) -> None:
    """Attach a new adapter `name` made of the adapters in `weights`, which may be of different methods.

    Combined is what they do to the weights, ΔWᵢ, so scalings and options play no part:

    - "linear": Σ wᵢ ΔWᵢ. "cat": the same, as a LoRA of as many ranks as that takes; "svd": as the
      best LoRA of `rank`.
    - "magnitude": Σ wᵢ of the `density` largest share of each ΔWᵢ. "dare": of a random share, times
      1 / density, drawn from `seed` (arXiv 2311.03099).
    - "ties": of the largest share, only what agrees with the sign of the weighted sum, as a weighted
      mean (arXiv 2306.01708); "dare_ties" of a random share.
    - "tensors": Σ wᵢ θᵢ of the adapters' own tensors, for adapters of one stack; the only way for
      methods without a weight form.

    Except for "cat", "svd" and "tensors" the result holds full-size differences (`dense`), or with
    `rank` their best LoRA. One adapter with weight 1 gives itself back, exactly, by "linear", "cat"
    and "tensors". Density and signs are taken per tensor.
    """
    state = start(model, name, "combine")
    _check(weights, how, rank, density)
    sources = {n: state.find(n) for n in weights}
    values = list(weights.values())
    if how == "tensors" or (how in ("linear", "cat") and values == [1.0] and rank is None):
        built = _by_tensors(state, name, sources, values)
    else:
        found = _by_weights(sources, values, how, density, seed)
        lower = how in ("cat", "svd") or rank is not None
        built = [low_rank(state, name, found, rank)[0] if lower else _dense(state, name, found)]
    place(state, built, activate=activate, trainable=trainable)


def _check(weights: Mapping[str, float], how: str, rank: int | None, density: float) -> None:
    if how not in (*RULES, "tensors") or not isinstance(weights, Mapping) or not weights:
        raise ConfigError(
            "this is no way to combine",
            saw=f"how={how!r}, weights={shown(weights)}",
            do=f"how in {sorted((*RULES, 'tensors'))}",
        )
    for source, weight in weights.items():
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ConfigError(
                "this is no weight of an adapter",
                saw=f"{source!r}: {shown(weight)}",
                do="give a finite number",
            )
    if not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ConfigError(
            "this is no share of the entries",
            saw=f"density={shown(density)}",
            do="give one above 0 and at most 1",
        )
    fits = rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0)
    if not fits or (how == "tensors" and rank is not None) or (how == "svd" and rank is None):
        raise ConfigError(
            f"{how!r} cannot have this rank",
            saw=f"rank={shown(rank)}",
            do='give a positive integer ("svd" needs one, "tensors" has none)',
        )


# -- by what they do to the weights ------------------------------------------------------------------


def _by_weights(
    sources: Mapping[str, list[Placed]], weights: list[float], how: str, density: float, seed: int
) -> list[Difference]:
    """Return the combined difference at each site that any of the adapters changes."""
    found = [differences(parts) for parts in sources.values()]
    sites = {name: d.site for each in found for name, d in each.items()}
    combined = []
    for number, (name, site) in enumerate(sites.items()):
        here = [each.get(name) for each in found]
        generator = torch.Generator().manual_seed(seed + number)
        weight, bias = (
            _joined([getattr(d, which, None) for d in here], weights, how, density, generator)
            for which in ("weight", "bias")
        )
        assert weight is not None
        combined.append(Difference(site, weight, bias))
    return combined


def _joined(
    tensors: Sequence[Tensor | None], weights: list[float], how: str, density: float, g: torch.Generator
) -> Tensor | None:
    """Return one tensor of each adapter's, None standing for 0; None if no adapter changes it."""
    like = next((t for t in tensors if t is not None), None)
    if like is None:
        return None
    stacked = torch.stack([torch.zeros_like(like) if t is None else t for t in tensors])
    keep, join = RULES[how]
    return join(keep(stacked, density, g), stacked.new_tensor(weights))


def _dense(state: State, name: str, found: Sequence[Difference]) -> Placed:
    """Return full-size differences as an adapter's only part."""
    anew = any(d.bias is not None and not d.site.has_bias for d in found)
    method = Dense(targets=tuple(d.site.name for d in found), new_biases=anew)
    adapter = build_adapter(state.model, method, tuple(d.site for d in found), path=f"{name}/{method.id}")
    with torch.no_grad():
        for difference, (_, delta) in zip(found, adapter.placed, strict=True):
            assert isinstance(delta, Shift)
            assert delta.weight is not None
            delta.weight.copy_(difference.weight)
            if difference.bias is not None:
                assert delta.bias is not None
                delta.bias.copy_(difference.bias)
    return Placed(state.next_id, name, method.id, method, adapter)


def _all(stacked: Tensor, density: float, generator: torch.Generator) -> Tensor:
    return stacked


def _largest(stacked: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return each of the stacked tensors (n, ...) with all but the largest share of its entries at 0."""
    flat = stacked.flatten(1)
    keep = max(1, round(density * flat.shape[1]))
    threshold = flat.abs().kthvalue(flat.shape[1] - keep + 1, dim=1, keepdim=True).values
    return torch.where(flat.abs() >= threshold, flat, torch.zeros_like(flat)).view_as(stacked)


def _dropped(stacked: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return the stacked tensors with a random share of their entries times 1 / share, the others at 0."""
    kept = torch.rand(stacked.shape, generator=generator) < density
    return stacked * kept.to(stacked.device) / density


def _sum(stacked: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of tensors (n, ...)."""
    return torch.einsum("n...,n->...", stacked, weights)


def _elected(stacked: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of the entries whose sign is that of the weighted sum."""
    shares = weights.view(-1, *(1,) * (stacked.dim() - 1))
    votes = stacked * shares
    agree = (votes.sign() == votes.sum(0).sign()) & (votes != 0)
    return (votes * agree).sum(0) / (agree * shares).sum(0).abs().clamp(min=1e-12)


# What is kept of each ΔWᵢ, and how these are joined.
RULES: dict[str, tuple[Keep, Join]] = {
    "linear": (_all, _sum), "cat": (_all, _sum), "svd": (_all, _sum), "magnitude": (_largest, _sum),
    "dare": (_dropped, _sum), "ties": (_largest, _elected), "dare_ties": (_dropped, _elected),
}  # fmt: skip

# -- tensor by tensor ---------------------------------------------------------------------------------


def _by_tensors(
    state: State, name: str, sources: Mapping[str, list[Placed]], weights: list[float]
) -> list[Placed]:
    _check_alike(sources)
    return [
        _summed(state, name, number, parts, weights)
        for number, parts in enumerate(zip(*sources.values(), strict=True))
    ]


def _check_alike(sources: Mapping[str, list[Placed]]) -> None:
    kinds = {
        n: [(p.method, [s.name for s in p.adapter.sites]) for p in parts] for n, parts in sources.items()
    }
    first_name, first = next(iter(kinds.items()))
    for other, kind in kinds.items():
        if kind != first:
            raise ConfigError(
                "only adapters of one stack can be combined tensor by tensor",
                saw=f"{first_name!r} and {other!r} differ in methods, settings or sites",
                do='combine what they do to the weights: how="linear"; or use both: inlay.use(...)',
            )
        for one, two in zip(sources[first_name], sources[other], strict=True):
            if not _measured_alike(one.adapter, two.adapter):
                raise ConfigError(
                    "adapters of different calibration cannot be combined tensor by tensor",
                    saw=f"{one.path!r} and {two.path!r} chose other entries, ranks or values",
                    do='combine what they do to the weights: how="linear"; or use both: inlay.use(...)',
                )


def _measured_alike(one: Adapter, two: Adapter) -> bool:
    """Whether two adapters have the same calibration and data, so that their tensors correspond."""
    kept, other = one.measured, two.measured
    if one.data != two.data or kept.keys() != other.keys():
        return False
    return all(
        t.shape == other[k].shape and bool((t == other[k].to(t.device)).all()) for k, t in kept.items()
    )


def _summed(state: State, name: str, number: int, parts: Sequence[Placed], weights: list[float]) -> Placed:
    like = parts[0]
    adapter = build_adapter(
        state.model, like.method, like.adapter.sites, seed=like.adapter.seed, data=like.adapter.data,
        calibration=like.adapter.measured, find=state.adapter_of, filled=True, dtype=like.adapter.dtype,
    )  # fmt: skip
    target = registry.call("state_dict", like.method, adapter=adapter)
    sources = [registry.call("state_dict", p.method, adapter=p.adapter) for p in parts]
    factors = torch.tensor(weights, dtype=torch.float32)
    with torch.no_grad():
        for key, tensor in target.items():
            if weights == [1.0] or not tensor.is_floating_point():
                tensor.copy_(sources[0][key])
                continue
            stacked = torch.stack([s[key].float() for s in sources])
            tensor.copy_(_sum(stacked, factors.to(stacked.device)))
    return Placed(state.next_id + number, name, like.part_name, like.method, adapter)
