"""What the contract asks of hook functions, of their answers, and of observers.

pluggy accepts a misspelt hook and never calls it, leaves parameters with defaults unfilled, and
takes any answer but None; what it would accept silently is refused here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pluggy
from torch import Tensor

from inlay import hookspecs
from inlay.errors import RegistryError, near, shown

HOOKS = tuple(name for name, f in vars(hookspecs).items() if hasattr(f, "inlay_spec"))


def marked_in(plugin: Any) -> dict[str, Any]:
    """Return the functions of a class or object that are marked as hooks."""
    return {n: f for n, f in inspect.getmembers(plugin, inspect.isroutine) if hasattr(f, "inlay_impl")}


def miswritten(marked: dict[str, Any]) -> str:
    """Say which marked function pluggy would not call, or not fill; "" if none."""
    for name, function in marked.items():
        if name not in HOOKS:
            return f"{name!r} is not a hook; {near(name, HOOKS)}"
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is not parameter.empty or parameter.kind is parameter.KEYWORD_ONLY:
                return f"{name}({parameter}) has a default or is keyword-only, so it would not be filled"
            if parameter.name not in inspect.signature(getattr(hookspecs, name)).parameters:
                return f"{name} takes {parameter.name!r}, which the hook does not have"
    return ""


def wrong_answer(hook: str, answer: Any) -> str:
    """Say in words how an answer is not of the type the contract names; "" if it is."""
    from inlay.training import Group, Stage

    tensors = (Mapping, Tensor)
    kinds: dict[str, tuple[Any, Any]] = {
        "trainable_mask": (Mapping, bool), "merge": (Mapping, Callable), "state_dict": tensors,
        "migrate": tensors, "calibrate": tensors, "prepare": tensors, "parameter_groups": (Sequence, Group),
        "stages": (Sequence, Stage), "auxiliary_loss": (Tensor, object),
    }  # fmt: skip
    whole, item = kinds.get(hook, (object, object))
    if not isinstance(answer, whole):
        return f"a {type(answer).__name__}"
    items: Any = answer.values() if whole is Mapping else answer if whole is Sequence else ()
    bad = next((i for i in items if not isinstance(i, item)), None)
    return "" if bad is None else f"a {type(answer).__name__} holding a {type(bad).__name__}"


def check_observer(observer: Any, manager: pluggy.PluginManager) -> None:
    """Refuse an observer that would answer a hook in a method's place, or never be called."""
    marked = marked_in(observer)
    answering = [n for n, f in marked.items() if not (f.inlay_impl["wrapper"] or f.inlay_impl["hookwrapper"])]
    reason = miswritten(marked)
    if answering:
        reason = f"{answering[0]} does not wrap: write @hookimpl(wrapper=True) and yield once"
    elif not marked:
        reason = "it wraps no hook"
    elif manager.is_registered(observer):
        reason = "it observes already"
    if reason:
        raise RegistryError(
            "this cannot observe hooks",
            saw=f"{shown(observer)}: {reason}",
            do="give an object whose methods are hook wrappers",
        )
