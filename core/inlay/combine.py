"""Combining adapters of one shape into a new one, by their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from inlay.adapter import Adapter
from inlay.attach import place, start
from inlay.errors import ConfigError, shown
from inlay.plan import build_adapter
from inlay.registry import registry
from inlay.stack import Placed, State


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    how: str = "linear",
    activate: bool = False,
    trainable: bool = False,
) -> None:
    """Attach a new adapter `name` whose every tensor is made from those of the adapters in `weights`.

    `how="linear"`: θ = Σ wᵢ θᵢ. `how="ties"`: per tensor, keep each adapter's largest fifth, elect
    the sign of the weighted sum, average what agrees with it (arXiv 2306.01708). The adapters must
    be of the same stack; one adapter with weight 1 gives itself back exactly.
    """
    state = start(model, name, "combine")
    rule = RULES.get(how)
    if rule is None or not isinstance(weights, Mapping) or not weights:
        raise ConfigError(
            "this is no way to combine",
            saw=f"how={how!r}, weights={shown(weights)}",
            do=f"how in {sorted(RULES)}",
        )
    for source, weight in weights.items():
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ConfigError(
                "this is no weight of an adapter",
                saw=f"{source!r}: {shown(weight)}",
                do="give a finite number",
            )
    sources = {n: state.find(n) for n in weights}
    _check_alike(sources)
    built = []
    for number, like in enumerate(next(iter(sources.values()))):
        parts = [placed[number] for placed in sources.values()]
        built.append(_combined(state, name, like, number, parts, list(weights.values()), rule))
    place(state, built, activate=activate, trainable=trainable)


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
                do="train them from the same stack, or use both: inlay.use(model, first, second)",
            )
        for one, two in zip(sources[first_name], sources[other], strict=True):
            if not _measured_alike(one.adapter, two.adapter):
                raise ConfigError(
                    "adapters of different calibration cannot be combined tensor by tensor",
                    saw=f"{one.path!r} and {two.path!r} chose other entries, ranks or values",
                    do="use both: inlay.use(model, first, second)",
                )


def _measured_alike(one: Adapter, two: Adapter) -> bool:
    """Whether two adapters have the same calibration and data, so that their tensors correspond."""
    kept, other = one.calibration, two.calibration
    if one.data != two.data or kept.keys() != other.keys():
        return False
    return all(
        t.shape == other[k].shape and bool((t == other[k].to(t.device)).all()) for k, t in kept.items()
    )


def _combined(
    state: State,
    name: str,
    like: Placed,
    number: int,
    parts: list[Placed],
    weights: list[float],
    rule: Callable[[Tensor, Tensor], Tensor],
) -> Placed:
    adapter = build_adapter(
        state.model, like.method, like.adapter.sites, seed=like.adapter.seed, data=like.adapter.data,
        calibration=like.adapter.calibration, find=state.adapter_of, filled=True,
    )  # fmt: skip
    target = registry.call("state_dict", like.method, adapter=adapter)
    sources = [registry.call("state_dict", p.method, adapter=p.adapter) for p in parts]
    factors = torch.tensor(weights, dtype=torch.float32)
    with torch.no_grad():
        for key, tensor in target.items():
            if (len(sources) == 1 and weights == [1.0]) or not tensor.is_floating_point():
                tensor.copy_(sources[0][key])
                continue
            stacked = torch.stack([s[key].float() for s in sources])
            tensor.copy_(rule(stacked, factors.to(stacked.device)))
    return Placed(state.next_id + number, name, like.part_name, like.method, adapter)


def _linear(stacked: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("n...,n->...", stacked, weights)


def _ties(stacked: Tensor, weights: Tensor, density: float = 0.2) -> Tensor:
    flat = stacked.flatten(1)
    keep = max(1, round(density * flat.shape[1]))
    threshold = flat.abs().kthvalue(flat.shape[1] - keep + 1, dim=1, keepdim=True).values
    trimmed = torch.where(flat.abs() >= threshold, flat, torch.zeros_like(flat)) * weights[:, None]
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    share = (agree * weights[:, None]).sum(0).clamp(min=1e-12)
    return ((trimmed * agree).sum(0) / share).view(stacked.shape[1:])


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"linear": _linear, "ties": _ties}
