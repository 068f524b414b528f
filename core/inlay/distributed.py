"""Several processes: what they must agree on, what one of them writes, what a sharded model starts with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inlay import identity
from inlay.errors import StateError
from inlay.plan import build_adapter
from inlay.reached import several
from inlay.registry import registry
from inlay.stack import Placed, State, need_state
from inlay.weights import whole


def check_same(model: nn.Module) -> None:
    """Raise unless all processes have the same stack, from the same packages, on the same base.

    Every process must call it; before DDP or `fully_shard`, and before the first step. It reads a
    sample of the base and all of the adapters, as they are to start.
    """
    state = need_state(model)
    agree(_facts(state))


def agree(facts: Mapping[str, str]) -> None:
    """Raise, in every process, where one has other `facts`; every process must call it."""
    if not several():
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dict(facts))
    lines = [
        f"{name}: {found[0].get(name, 'nothing')} in process 0, {other.get(name, 'nothing')} in process {rank}"
        for rank, other in enumerate(found)
        for name in dict.fromkeys((*found[0], *other))
        if found[0].get(name) != other.get(name)
    ]
    if lines:
        raise StateError(
            "the processes are not about to train the same",
            saw="".join(f"\n  {line}" for line in lines),
            do="give every process the same packages, settings, seed and base model",
        )


def _facts(state: State) -> dict[str, str]:
    base = identity.identity(state.model)
    facts = {f"base, {key}": str(base[key]) for key in ("architecture", "config", "shapes", "weights")}
    for placed in state.placed.values():
        origin = registry.origin(type(placed.method))
        facts[f"method {placed.method.id!r}"] = f"{origin.distribution} {origin.version}"
        facts[placed.path] = f"{placed.method!r} on {len(placed.adapter.sites)} sites"
        values = {f"{placed.path}/{name}": t for name, t in placed.adapter.tensors().items()}
        facts[f"{placed.path}, values"] = str(identity.sample(values))[:16]
    return facts


def mesh_of(model: nn.Module) -> Any:
    """Return the device mesh a model is sharded over, or None."""
    return next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)


def once(mesh: Any, write: Callable[[], None]) -> None:
    """Run `write` in one process of those that share a model, and end after it in all; `mesh` None: here.

    Where it fails, it fails in all.
    """
    if mesh is None:
        write()
        return
    error: Exception | None = None
    if not any(mesh.get_coordinate()):
        try:
            write()
        except Exception as raised:
            error = raised
    for dim in range(mesh.ndim):  # along each dimension in turn, and so to all
        group = mesh.get_group(dim)
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, error, group=group)
        error = next((e for e in told if e is not None), None)
    if error is not None:
        raise error


def fill(model: nn.Module) -> None:
    """Give the adapters of a model that was attached to on meta the values they start with.

    Call it, in every process, once the base has its weights (`to_empty`, then a state dict). The values
    are drawn from the adapters' own seeds: the very ones that one process, with the model whole, gets.
    """
    state = need_state(model)
    for placed in state.placed.values():
        _fill(state, placed)


def _fill(state: State, placed: Placed) -> None:
    adapter = placed.adapter
    made = build_adapter(
        state.model, placed.method, adapter.sites, seed=adapter.seed, calibration=adapter.measured,
        data=adapter.data, find=state.adapter_of, dtype=adapter.dtype,
    )  # fmt: skip
    values = _tensors(made)
    with torch.no_grad():
        for name, tensor in _tensors(adapter).items():
            _put(tensor, values[name])


def _tensors(adapter: Any) -> dict[str, Tensor]:
    """Return parameters and buffers, those that are not saved too, under local names."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, module in adapter.modules()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def _put(tensor: Tensor, value: Tensor) -> None:
    """Write `value` into a tensor, or this process's part of it into its part."""
    if not hasattr(tensor, "device_mesh"):
        tensor.copy_(whole(value))
        return
    from torch.distributed.tensor import distribute_tensor

    there: Any = tensor
    part = distribute_tensor(whole(value).to(there.device), there.device_mesh, there.placements)
    there.to_local().copy_(part.to_local())
