"""Writing the base's weights in a merge: where that can be done, and what puts back what was there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from inlay.backends import backend_of
from inlay.errors import CannotMerge
from inlay.hosts import own_class
from inlay.sites import ModuleSite, Site
from inlay.sites.site import held_by
from inlay.stack import State
from inlay.thaw import bytes_of, put
from inlay.weights import parts_of, stored


@dataclass
class Undo:
    """What a merge replaced, to be put back: tensors of plain layers, quantised layers as they were."""

    tensors: list[tuple[nn.Module, str, Tensor | None]] = field(default_factory=list)
    layers: dict[nn.Module, nn.Module] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.layers)

    @property
    def bytes(self) -> int:
        tensors = sum(t.numel() * t.element_size() for _, _, t in self.tensors if t is not None)
        return tensors + sum(map(bytes_of, self.layers.values()))

    def put_back(self) -> None:
        _put_back(self.tensors)
        for module, original in self.layers.items():
            put(module, original)


def check_can_write(state: State, site: Site, quantised: str | None = None) -> None:
    """Raise unless the site's weight can be replaced without changing anything else."""
    assert isinstance(site, ModuleSite)
    module, leaf = held_by(site.module, site.weight_name)
    backend = backend_of(module)
    names = [leaf] if backend is None else list(module._parameters)
    held = [tensor for name in names if (tensor := module._parameters.get(name)) is not None]
    reason, way = "", "merge other parts, or keep it attached"
    if backend is not None and not backend.readable:
        reason = f"it is a quantised {own_class(module).__name__}, and no backend can read its weight"
    elif backend is not None and quantised is None:
        reason = "it is quantised"
        way = (
            'merge(..., quantised="dequantise") makes it a plain layer, "requantise" writes it back in few '
            "bits and reports what that costs; or keep it attached"
        )
    elif not held:
        reason = "its weight is computed by a parametrization; remove that first"
    elif any(type(t.data).__name__ == "DTensor" or hasattr(t, "placements") for t in held):
        reason = "its weight is sharded; merge before sharding, or load on one process"
    elif any(stored(module, name) is not stored(module, name) for name in names):
        reason = "its weight is offloaded to disk; merge before offloading"
    else:
        reason = _shared_with(state, module, names)
    if reason:
        raise CannotMerge(
            "the weight cannot be written",
            saw=f"{site.name}: {reason}",
            do=way,
        )


def _shared_with(state: State, module: nn.Module, names: Sequence[str]) -> str:
    """Return why writing would change another use of the same storage, or ""."""
    kept = (stored(module, name) for name in names)
    storages = {storage for tensor in kept if tensor is not None for storage in _storages(tensor)}
    for path, owner in state.model.named_modules(remove_duplicate=False):
        for name in owner._parameters if owner is not module else ():
            other = stored(owner, name)
            if other is not None and storages & _storages(other):
                return f"its storage is tied to {path}.{name}; untie them, or keep it attached"
    return ""


def _storages(tensor: Tensor) -> set[int]:
    return {part.untyped_storage().data_ptr() for part in parts_of(tensor)} - {0}


def write(module: nn.Module, tensors: dict[str, Tensor]) -> list[tuple[nn.Module, str, Tensor | None]]:
    """Put tensors into a module's parameters; return what was there."""
    old: list[tuple[nn.Module, str, Tensor | None]] = []
    for path, tensor in tensors.items():
        owner, name = held_by(module, path)
        parameter = owner._parameters.get(name)
        if parameter is None:
            old.append((owner, name, None))
            owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        elif parameter.device.type == "meta":
            kept = stored(owner, name)
            assert kept is not None
            old.append((owner, name, kept.clone()))
            kept.copy_(tensor)
        else:
            old.append((owner, name, parameter.data))
            parameter.data = tensor.to(parameter.device)
    return old


def _put_back(written: Sequence[tuple[nn.Module, str, Tensor | None]]) -> None:
    for module, name, tensor in reversed(written):
        parameter = module._parameters[name]
        if tensor is None:
            module._parameters[name] = None
        elif parameter is not None and parameter.device.type == "meta":
            kept = stored(module, name)
            assert kept is not None
            kept.copy_(tensor)
        else:
            assert parameter is not None
            parameter.data = tensor
