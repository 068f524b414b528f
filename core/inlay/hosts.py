"""Hosts: modules of the base that run deltas.

`module.__class__` becomes a cached subclass of the module's own class, with the same name; its
`forward` asks the port for a program. Deltas live in the child `inlay`. Leaving restores the class.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn

from inlay.context import Slot
from inlay.errors import AttachError
from inlay.ports import Port
from inlay.recompute import Bound
from inlay.sites.site import hooks_of

CHILD = "inlay"


class Host(nn.Module):
    """Mixin in front of a module's own class: runs the program the port holds for this call."""

    _inlay_base: type[nn.Module]
    _inlay_port: HostPort

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        port = self._inlay_port
        call = port.slot.call
        program = port.program if call is None else call.programs[port.index]
        if program is None:
            return super().forward(*args, **kwargs)
        return program(self, super().forward, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        return (_rebuild, (self._inlay_base, _is_scope(type(self))), *reduced[2:])


class Deltas(nn.ModuleDict):
    """The adapters' modules on one host, by the number of their part.

    A plain base state dict still loads strictly: what it does not mention keeps its values.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            own: dict[str, Tensor] = self.state_dict(prefix=prefix)
            state_dict.update({key: tensor.detach() for key, tensor in own.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


def base_size(model: nn.Module) -> int:
    """Return how many parameters the base model has, without any adapter's."""
    own = {p for m in model.modules() if isinstance(m, Deltas) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if p not in own)


@cache
def host_class(base: type[nn.Module], scope: bool = False) -> type[nn.Module]:
    """Return the cached subclass of `base`; with `scope`, one that also opens a call of the model."""
    from inlay.scope import PretrainedScope, Scope

    opener = PretrainedScope if hasattr(base, "save_pretrained") else Scope
    bases = (opener, Host, base) if scope else (Host, base)
    namespace: dict[str, Any] = {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
        "_inlay_base": base,
    }  # fmt: skip
    if scope:
        namespace["forward"] = _same_signature(Scope.forward, base)
    if issubclass(base, nn.Sequential | nn.ModuleList):
        namespace |= {"__iter__": _iter_without_deltas, "__len__": _len_without_deltas}
    made: type[nn.Module] = type(base)(base.__name__, bases, namespace)  # type: ignore[misc]
    return made


def _iter_without_deltas(self: nn.Module) -> Iterator[nn.Module]:
    return iter([module for name, module in self._modules.items() if name != CHILD])  # type: ignore[misc]


def _len_without_deltas(self: nn.Module) -> int:
    return len(self._modules) - (CHILD in self._modules)


def _same_signature(function: Any, base: type[nn.Module]) -> Any:
    """Return a copy of `function` that shows the signature of base.forward (transformers reads it)."""
    copied = types.FunctionType(
        function.__code__, function.__globals__, "forward", function.__defaults__, function.__closure__
    )
    copied.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    copied.__doc__ = base.forward.__doc__
    return copied


def _is_scope(kind: type) -> bool:
    from inlay.scope import Scope

    return issubclass(kind, Scope)


def _rebuild(base: type[nn.Module], scope: bool) -> nn.Module:
    kind = host_class(base, scope)  # type: ignore[arg-type]
    return kind.__new__(kind)


def check_can_host(module: nn.Module, name: str) -> None:
    """Raise if something else already stands in front of the module's class."""
    check_own_forward(module, name)
    if not isinstance(getattr(module, CHILD, None), Deltas | None):
        raise AttachError(
            f"a module already has an attribute {CHILD!r}",
            saw=name,
            do="rename it; inlay keeps its deltas there",
        )
    if hasattr(module, "base_layer") and "peft" in type(module).__module__:
        raise AttachError(
            "a module is wrapped by another library's adapter",
            saw=f"{name} is {type(module).__module__}.{type(module).__name__}",
            do="unload that adapter first (peft: model.unload())",
        )


def check_own_forward(module: nn.Module, name: str) -> None:
    """Raise if the module's class does not decide what its call does."""
    foreign = module.__dict__.get("_old_forward" if hooks_of(module) else "forward")
    if foreign is not None and not _is_own_forward(module, foreign):
        raise AttachError(
            "a module's forward has been replaced on the instance, so an adapter there would have no effect",
            saw=f"{name or type(module).__name__}.forward is {foreign!r:.120}",
            do="remove that patch first (del module.forward), or choose other targets",
        )


class HostPort(Port):
    """The port of a host: entering puts the module under a subclass of its own class.

    With `scope`, the model's `State`, it becomes a scope, which opens the calls.
    """

    def __init__(self, slot: Slot, name: str, module: nn.Module, *, scope: Any = None) -> None:
        super().__init__(slot, name, module)
        self.scope, self.lasting = scope, scope is not None

    def check(self) -> None:
        check_can_host(self.module, self.name)
        try:
            host_class(type(self.module), self.lasting)  # type: ignore[arg-type]
        except Exception as error:
            raise AttachError(
                "a module's class cannot be subclassed, so nothing can be placed on it",
                saw=f"{self.name} is a {type(self.module).__name__}: {error}",
                do="choose other targets",
            ) from error

    def enter(self) -> None:
        become(self.module, host_class(type(self.module), self.lasting))  # type: ignore[arg-type]
        self.module.__dict__["_inlay_port"] = self
        if self.lasting:
            self.module.__dict__["_inlay_state"] = self.scope

    def leave(self) -> None:
        self.module._modules.pop(CHILD, None)
        self.module.__dict__.pop("_inlay_port", None)
        self.module.__dict__.pop("_inlay_state", None)
        become(self.module, own_class(self.module))


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change a module's class; accelerate's hook (on the instance) calls the class's forward of now."""
    object.__setattr__(module, "__class__", kind)
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(kind.forward, module)
    elif isinstance(module.__dict__.get("forward"), types.MethodType):
        module.__dict__["forward"] = types.MethodType(kind.forward, module)


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class a module has, or had before it became a host."""
    return getattr(type(module), "_inlay_base", type(module))


def change_own_class(module: nn.Module, base: type[nn.Module]) -> None:
    """Make a module one of class `base`, under the host it is, if it is one."""
    become(module, host_class(base, _is_scope(type(module))) if isinstance(module, Host) else base)  # type: ignore[arg-type]


def check_can_leave(ports: Iterable[Port]) -> None:
    """Raise if another library put its own class on top of ours since."""
    for name, module in ((p.name, p.module) for p in ports if isinstance(p, HostPort)):
        base = getattr(type(module), "_inlay_base", None)
        if base is not None and type(module) in (host_class(base, False), host_class(base, True)):
            continue
        ways = {"Parametrized": "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')",
                "FSDP": "detach before fully_shard, or load the checkpoint into a fresh model"}  # fmt: skip
        way = next((w for k, w in ways.items() if type(module).__name__.startswith(k)), "undo that first")
        raise AttachError(
            "a module changed its class after the adapter was attached",
            saw=f"{name} is now {type(module).__module__}.{type(module).__name__}",
            do=way,
        )


def check_unwrapped(ports: Iterable[Port]) -> None:
    """Raise if a model's forward was wrapped: the wrapper would still call the one that goes.

    accelerate's hooks keep what they wrap where it can be replaced.
    """
    for port in ports:
        if isinstance(port, HostPort) and _is_wrapped(port.module) and not hooks_of(port.module):
            wrapper = getattr(port.module.__dict__["forward"], "__qualname__", "a wrapper")
            raise AttachError(
                "the model's forward was wrapped after the adapter was attached",
                saw=f"{port.name or type(port.module).__name__}.forward is {wrapper}",
                do="undo that first (accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))",
            )


def is_running(module: nn.Module) -> bool:
    """Return whether the module's forward is the one that runs when the module is called.

    Before a model's own may stand what says that it wraps it, as accelerate's mixed precision does.
    """
    instance = module.__dict__.get("forward")
    if instance is None or _is_own_forward(module, instance) or _is_wrapped(module):
        return True
    inner = module.__dict__.get("_old_forward")
    return getattr(inner, "__func__", None) is type(module).forward


def _is_wrapped(module: nn.Module) -> bool:
    """Return whether what stands before a model's forward is a wrapper of it (`functools.wraps`)."""
    instance = module.__dict__.get("forward")
    if instance is None or not _is_scope(type(module)) or _is_own_forward(module, instance):
        return False
    wrapped = inspect.unwrap(instance)
    return getattr(wrapped, "__func__", wrapped) is type(module).forward


def _is_own_forward(module: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__func__", None) is type(module).forward


def bind_checkpointing(modules: Iterable[nn.Module], slot: Slot) -> None:
    """Let gradient checkpointing recompute blocks under the call they first ran in."""
    for module in modules:
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, Bound):
            module.__dict__["_gradient_checkpointing_func"] = Bound(function, slot)


def unbind_checkpointing(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, Bound):
            module.__dict__["_gradient_checkpointing_func"] = function.checkpoint
