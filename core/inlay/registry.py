"""The registry finds methods by entry point, checks them, and calls their hooks.

The only importer of `pluggy.PluginManager`. Names come from package metadata; a method's code is
imported at its first use, so one broken plugin hurts only itself.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from inlay import hookspecs
from inlay.errors import RegistryError, near
from inlay.method import Method
from inlay.settings import from_plain

GROUP, OBSERVERS = "inlay.methods", "inlay.observers"
HOOKS = tuple(name for name, f in vars(hookspecs).items() if hasattr(f, "inlay_spec"))


@dataclass(frozen=True)
class Origin:
    """Which distribution offers a method, and where its code is."""

    name: str
    distribution: str
    version: str
    value: str


class Registry:
    """All methods this process can use, and the pluggy manager that dispatches to them."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._adopted: dict[type[Method], Any] = {}
        self._local: dict[str, type[Method]] = {}
        self._observers: list[Any] = []
        if os.environ.get("INLAY_TRACE") == "1":
            self._manager.add_hookcall_monitoring(_print_call, lambda *_: None)

    # -- names -----------------------------------------------------------------------------------

    def origins(self) -> dict[str, list[Origin]]:
        """Return what is offered under each name, from metadata alone."""
        allowed = os.environ.get("INLAY_LOAD_PLUGINS")
        chosen = None if allowed is None else {a.strip() for a in allowed.split(",") if a.strip()}
        found: dict[str, list[Origin]] = {}
        for entry in entry_points(group=GROUP):
            origin = _origin(entry)
            if chosen is None or origin.distribution in chosen:
                found.setdefault(entry.name, [])
                if origin not in found[entry.name]:
                    found[entry.name].append(origin)
        return found

    def methods(self) -> dict[str, Origin]:
        """Return the installed methods by name, with distribution and version; nothing is imported."""
        offers = {name: found[0] for name, found in sorted(self.origins().items())}
        return offers | {name: self.origin(kind) for name, kind in self._local.items()}

    def get(self, name: str) -> type[Method]:
        """Return the method class called `name`, importing it if need be."""
        if name in self._local:
            return self._local[name]
        offers = self.origins().get(name, [])
        if not offers:
            raise RegistryError(
                f"no installed package offers the method {name!r}",
                saw=f"methods here: {', '.join(sorted(self.origins() | self._local)) or 'none'}",
                do=f"pip install {_package_of(name)}, or " + near(name, self.origins() | self._local),
            )
        if len({o.distribution for o in offers}) > 1:
            raise RegistryError(
                f"method {name!r} is offered by two packages",
                saw=" and ".join(f"{o.distribution} {o.version}" for o in offers),
                do="uninstall one of them, or set INLAY_LOAD_PLUGINS to the packages to use",
            )
        return self._import(offers[0])

    def build(self, name: str, settings: dict[str, Any]) -> Method:
        """Return the method `name` configured with plain `settings`."""
        method: Method = from_plain(self.get(name), settings, self.build)
        return method

    def register(self, kind: type[Method]) -> type[Method]:
        """Offer a method class defined in this process; for notebooks and tests. Usable as decorator."""
        self._adopt(kind)
        self._local[kind.id] = kind
        return kind

    def forget(self, kind: type[Method]) -> None:
        """Undo `register`."""
        self._local.pop(kind.id, None)

    def origin(self, kind: type[Method]) -> Origin:
        """Return where a method class comes from."""
        return _origin_of(kind.id, f"{kind.__module__}:{kind.__qualname__}")

    # -- calls -----------------------------------------------------------------------------------

    def call(self, hook: str, method: Method, **arguments: Any) -> Any:
        """Call a hook on the method's own implementation; observers wrap it."""
        plugin = self._adopt(type(method))
        others = [p for p in self._adopted.values() if p is not plugin]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        try:
            answer = caller(method=method, **arguments)
        except Exception as error:
            error.add_note(f"raised by {self._whence(type(method))} in its hook {hook!r}")
            raise
        if answer is None and hook not in ("auxiliary_loss",):
            raise RegistryError(
                f"the hook {hook!r} gave no answer",
                saw=f"None from {self._whence(type(method))}",
                do="return a value ({} or [] where there is nothing to say)",
            )
        return answer

    def implements(self, method: Method, hook: str) -> bool:
        """Return whether the method answers an optional hook."""
        return callable(getattr(type(method), hook, None))

    @contextmanager
    def observing(self, *observers: Any) -> Iterator[None]:
        """Let `observers` (objects with hook wrappers, or names of `inlay.observers`) wrap every hook."""
        loaded = [self._load_observer(o) if isinstance(o, str) else o for o in observers]
        for observer in loaded:
            self._manager.register(observer)
        try:
            yield
        finally:
            for observer in loaded:
                self._manager.unregister(observer)

    def _load_observer(self, name: str) -> Any:
        found = {e.name: e for e in entry_points(group=OBSERVERS)}
        if name not in found:
            raise RegistryError(
                f"no installed package offers the observer {name!r}",
                saw=f"observers here: {', '.join(sorted(found)) or 'none'}",
                do="install it, or pass the observer object itself",
            )
        return found[name].load()

    # -- checks ----------------------------------------------------------------------------------

    def _import(self, origin: Origin) -> type[Method]:
        try:
            kind = EntryPoint(name=origin.name, value=origin.value, group=GROUP).load()
        except Exception as error:
            raise RegistryError(
                f"method {origin.name!r} failed to import",
                saw=f"{type(error).__name__}: {error} in {origin.distribution} {origin.version}",
                do=f"fix or reinstall {origin.distribution}; other methods are unaffected",
            ) from error
        if not (inspect.isclass(kind) and issubclass(kind, Method) and getattr(kind, "id", None) == origin.name):
            raise RegistryError(
                f"the entry point {origin.name!r} does not name a method of that id",
                saw=f"{origin.value} is {kind!r} with id {getattr(kind, 'id', None)!r}",
                do=f"point it at a subclass of inlay.method.Method with id = {origin.name!r}",
            )
        return kind

    def _adopt(self, kind: type[Method]) -> Any:
        if kind not in self._adopted:
            self._check(kind)
            plugin = _Plugin(kind)
            try:
                self._manager.register(plugin)
            except pluggy.PluginValidationError as error:
                self._manager.unregister(plugin)
                raise self._rejected(kind, str(error)) from error
            self._adopted[kind] = plugin
        return self._adopted[kind]

    def _check(self, kind: type[Method]) -> None:
        """Refuse what pluggy would accept and then not call, or call wrongly."""
        marked = {n: f for n, f in inspect.getmembers(kind, inspect.isroutine) if hasattr(f, "inlay_impl")}
        for name, function in marked.items():
            if name not in HOOKS:
                raise self._rejected(kind, f"{name!r} is not a hook; {near(name, HOOKS)}")
            for parameter in inspect.signature(function).parameters.values():
                if parameter.default is not parameter.empty or parameter.kind is parameter.KEYWORD_ONLY:
                    raise self._rejected(
                        kind, f"{name}({parameter}) has a default or is keyword-only, so it would not be filled"
                    )
        for name in HOOKS:
            own = inspect.getattr_static(kind, name, None)
            if own is not None and name not in marked:
                raise self._rejected(kind, f"{name} is not marked @hookimpl (or not a static method)")

    def _rejected(self, kind: type[Method], reason: str) -> RegistryError:
        return RegistryError(
            f"method {kind.id!r} does not keep the contract",
            saw=f"{reason} (in {self._whence(kind)})",
            do="compare with inlay/hookspecs.py; hooks are @staticmethod @hookimpl functions",
        )

    def _whence(self, kind: type[Method]) -> str:
        origin = self.origin(kind)
        return f"{kind.id!r} of {origin.distribution} {origin.version}".strip()


class _Plugin:
    """A method class as pluggy wants it: one plugin object whose attributes are hook functions."""

    def __init__(self, kind: type[Method]) -> None:
        for name, function in inspect.getmembers(kind, inspect.isroutine):
            if hasattr(function, "inlay_impl"):
                setattr(self, name, function)


@cache
def _origin_of(name: str, value: str) -> Origin:
    for entry in entry_points(group=GROUP):
        if entry.name == name and entry.value == value:
            return _origin(entry)
    return Origin(name, value.split(":")[0].split(".")[0], "", value)


def _origin(entry: EntryPoint) -> Origin:
    distribution = entry.dist
    if distribution is None:
        return Origin(entry.name, entry.value.split(":")[0].split(".")[0], "", entry.value)
    return Origin(entry.name, distribution.metadata["Name"], distribution.version, entry.value)


def _package_of(name: str) -> str:
    """Guess which of our own packages a method would come in; the naming rule is inlay-<family>."""
    return f"the inlay-* package that has {name!r} (see the table of methods in the docs)"


def _print_call(hook_name: str, _impls: Any, arguments: dict[str, Any]) -> None:
    method = arguments.get("method")
    print(f"inlay: {hook_name}({getattr(method, 'id', method)!r})")


registry = Registry()
