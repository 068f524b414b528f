"""Complete snapshots of a model, to show that it is bit for bit what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from inlay.weights import parts_of

HOOKS = "hooks"
TENSORS = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class TensorShot:
    """One parameter or buffer: the object, where its numbers lie, and a copy of them."""

    tensor: Tensor
    storage: int
    value: Tensor
    requires_grad: bool
    grad: Tensor | None


@dataclass(frozen=True)
class ModuleShot:
    """One module: the object, its class, and everything in its `__dict__` and hooks."""

    module: nn.Module
    kind: type
    forward: Any
    attributes: dict[str, Any]
    contents: dict[str, Any]
    children: dict[str, nn.Module | None]
    tensors: dict[str, TensorShot | None]


@dataclass(frozen=True)
class Snapshot:
    """Everything that identifies a model: modules by path, and its state_dict."""

    modules: dict[str, ModuleShot]
    state: dict[str, Tensor] = field(repr=False)


def snapshot(model: nn.Module) -> Snapshot:
    """Take a snapshot: modules, classes, attributes, hooks, parameters, buffers, flags, state_dict."""
    modules = {name: _shot(module) for name, module in model.named_modules(remove_duplicate=False)}
    return Snapshot(modules, {key: tensor.detach().clone() for key, tensor in model.state_dict().items()})


def differences(before: Snapshot, model: nn.Module, *, values: bool = True) -> list[str]:
    """Return what differs from `before`, in words; empty if nothing does.

    With `values=False` numbers may differ, but not what holds them (for a model merged for good).
    """
    after = snapshot(model)
    found = [f"{name}: module gone" for name in before.modules.keys() - after.modules.keys()]
    found += [f"{name}: new module" for name in after.modules.keys() - before.modules.keys()]
    for name in before.modules.keys() & after.modules.keys():
        found += [
            f"{name or '(root)'}: {d}" for d in _module(before.modules[name], after.modules[name], values)
        ]
    if list(before.state) != list(after.state):
        changed = before.state.keys() ^ after.state.keys()
        found.append(f"state_dict: other keys or order ({', '.join(sorted(changed)[:3]) or 'order'})")
    elif values:
        found += [f"state_dict: {k}" for k in before.state if not same_bits(before.state[k], after.state[k])]
    return sorted(found)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype and shape, and the same bits (NaN equal, −0 unlike 0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_meta or b.is_meta:  # offloaded: no bits to compare
        return a.is_meta and b.is_meta
    return all(torch.equal(_bytes(x), _bytes(y)) for x, y in zip(parts_of(a), parts_of(b), strict=True))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        for part in parts_of(tensor):
            found.update(_bytes(part).numpy().tobytes())
    return found.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _shot(module: nn.Module) -> ModuleShot:
    own = module.__dict__
    attributes = {k: v for k, v in own.items() if k not in TENSORS and not k.endswith(HOOKS)}
    tensors = {**module._parameters, **module._buffers}
    return ModuleShot(
        module=module,
        kind=type(module),
        forward=type(module).forward,
        attributes=attributes,
        contents={k: _content(v) for k, v in own.items() if k not in TENSORS},
        children=dict(module._modules),
        tensors={name: None if t is None else _tensor(t) for name, t in tensors.items()},
    )


def _content(value: Any) -> Any:
    """Return a copy of a plain container's entries, else None (identity is compared beside it)."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, set):
        return sorted(value, key=repr)
    if hasattr(value, "to_dict") and hasattr(value, "__dict__"):  # a transformers configuration
        return sorted((k, repr(v)) for k, v in vars(value).items())
    return None


def _tensor(tensor: Tensor) -> TensorShot:
    grad = None if tensor.grad is None else tensor.grad.detach().clone()
    value = tensor.detach()
    return TensorShot(tensor, value.data_ptr(), value.clone(), tensor.requires_grad, grad)


def _module(before: ModuleShot, after: ModuleShot, values: bool) -> Iterable[str]:
    if before.module is not after.module:
        yield "another module object"
    if before.kind is not after.kind:
        yield f"class {before.kind.__name__} became {after.kind!r}"
    if before.forward is not after.forward:
        yield "the class has another forward"
    yield from _mapping(
        "attribute", before.attributes, after.attributes, lambda a, b: a is b or _plain_equal(a, b)
    )
    yield from _mapping("content of", before.contents, after.contents, _same_content)
    yield from _mapping("child", before.children, after.children, lambda a, b: a is b)
    yield from _mapping("tensor", before.tensors, after.tensors, lambda a, b: _same_tensor(a, b, values))


def _mapping(what: str, before: dict[str, Any], after: dict[str, Any], same: Any) -> Iterable[str]:
    if list(before) != list(after) and what != "content of":
        gone, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
        yield f"{what}s: gone {gone}, new {new}" if gone or new else f"{what}s: other order"
    for name in before.keys() & after.keys():
        if not same(before[name], after[name]):
            yield f"{what} {name}"


def _plain_equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, str | int | float | bool | bytes | MethodType) and a == b


def _same_content(a: Any, b: Any) -> bool:
    if not (isinstance(a, list) and isinstance(b, list)):
        return (a is None) == (b is None)
    return len(a) == len(b) and all(_same_entry(x, y) for x, y in zip(a, b, strict=True))


def _same_entry(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same_entry(x, y) for x, y in zip(a, b, strict=True))
    return a is b or _plain_equal(a, b)


def _same_tensor(a: TensorShot | None, b: TensorShot | None, values: bool) -> bool:
    if a is None or b is None:
        return a is b
    if a.tensor is not b.tensor or a.requires_grad != b.requires_grad or (a.grad is None) != (b.grad is None):
        return False
    if not values:
        return a.value.shape == b.value.shape and a.value.dtype == b.value.dtype
    same_grad = a.grad is None or b.grad is None or same_bits(a.grad, b.grad)
    return a.storage == b.storage and same_bits(a.value, b.value) and same_grad
