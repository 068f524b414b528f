"""The registry finds methods by entry point, checks them, and calls their hooks.

The only importer of `pluggy.PluginManager`. Names come from package metadata; a method's code is
imported at its first use, so one broken plugin hurts only itself.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from inlay import hookspecs
from inlay.contract import HOOKS, check_observer, marked_in, miswritten, wrong_answer
from inlay.errors import RegistryError, near, shown
from inlay.method import Method
from inlay.packages import state_of_path
from inlay.settings import from_plain

GROUP, OBSERVERS = "inlay.methods", "inlay.observers"
SILENT = ("auxiliary_loss", "before_step", "after_backward", "after_step")  # hooks that need not answer


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
        self._offers: dict[str, list[Origin]] = {}
        self._stamp: tuple[Any, ...] = ()
        self._lasting = False  # whether the observers named in the environment wrap the hooks yet
        if os.environ.get("INLAY_TRACE") == "1":
            self._manager.add_hookcall_monitoring(_print_call, lambda *_: None)

    # -- names -----------------------------------------------------------------------------------

    def origins(self) -> dict[str, list[Origin]]:
        """Return what is offered under each name, from metadata alone; read again when packages change."""
        stamp = (os.environ.get("INLAY_LOAD_PLUGINS"), *state_of_path())
        if stamp != self._stamp:
            self._offers, self._stamp = self._read_origins(), stamp
        return self._offers

    def _read_origins(self) -> dict[str, list[Origin]]:
        allowed = os.environ.get("INLAY_LOAD_PLUGINS")
        chosen = None if allowed is None else {*map(_canonical, allowed.split(",")), hookspecs.PROJECT}
        found: dict[str, list[Origin]] = {}
        for entry in entry_points(group=GROUP):
            origin = _origin(entry)
            if chosen is None or _canonical(origin.distribution) in chosen:
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
                f"no installed package offers the method {shown(name)}",
                saw=f"methods here: {', '.join(sorted(self.origins() | self._local)) or 'none'}{_limited()}",
                do=f"pip install {_package_of(name)}, or " + near(name, self.origins() | self._local),
            )
        if len(offers) > 1:
            raise RegistryError(
                f"method {name!r} is offered more than once",
                saw=_several(offers),
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
        own = self.origin(kind)
        if others := [o for o in self.origins().get(kind.id, []) if o != own]:
            raise RegistryError(
                f"an installed package already offers a method {kind.id!r}",
                saw=f"{others[0].distribution} {others[0].version} offers it, and {own.value} would hide it",
                do="give your class another id",
            )
        self._local[kind.id] = kind
        return kind

    def forget(self, kind: type[Method]) -> None:
        """Undo `register`."""
        self._local.pop(kind.id, None)

    def origin(self, kind: type[Method]) -> Origin:
        """Return where a method class comes from."""
        return _origin_of(kind)  # type: ignore[arg-type]

    # -- calls -----------------------------------------------------------------------------------

    def call(self, hook: str, method: Method, *, observed: bool = True, **arguments: Any) -> Any:
        """Call a hook on the method's own implementation; observers wrap it (unless it is only asked)."""
        plugin = self._adopt(type(method))
        self._observe_environment()
        among = self._adopted.values() if observed else self._manager.get_plugins()
        others = [p for p in among if p is not plugin]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        try:
            answer = caller(method=method, **arguments)
        except Exception as error:
            error.add_note(f"raised by {self._whence(type(method))} in its hook {hook!r}")
            raise
        return self.checked(hook, method, answer)

    def checked(self, hook: str, method: Method, answer: Any) -> Any:
        """Return what a hook gave; raise if it is not what the contract names."""
        if answer is None and hook not in SILENT:
            raise RegistryError(
                f"the hook {hook!r} gave no answer",
                saw=f"None from {self._whence(type(method))}",
                do="return a value ({} or [] where there is nothing to say)",
            )
        if answer is not None and (wrong := wrong_answer(hook, answer)):
            raise RegistryError(
                f"the hook {hook!r} gave an answer of the wrong type",
                saw=f"{wrong} from {self._whence(type(method))}",
                do=f"return what inlay/hookspecs.py says of {hook}",
            )
        return answer

    def implements(self, method: Method, hook: str) -> bool:
        """Return whether the method answers an optional hook."""
        return callable(getattr(type(method), hook, None))

    @contextmanager
    def observing(self, *observers: Any) -> Iterator[None]:
        """Let `observers` (objects with hook wrappers, or names of `inlay.observers`) wrap every hook."""
        loaded = [load_one(OBSERVERS, "observer", o) if isinstance(o, str) else o for o in observers]
        for observer in loaded:
            check_observer(observer, self._manager)
        for observer in loaded:
            self._manager.register(observer)
        try:
            yield
        finally:
            for observer in loaded:
                self._manager.unregister(observer)

    def _observe_environment(self) -> None:
        """Register the observers named in INLAY_OBSERVERS, once, before the first hook is called."""
        if not self._lasting:
            named = [n.strip() for n in os.environ.get("INLAY_OBSERVERS", "").split(",") if n.strip()]
            for observer in [load_one(OBSERVERS, "observer", n) for n in dict.fromkeys(named)]:
                check_observer(observer, self._manager)
                self._manager.register(observer)
            self._lasting = True

    # -- checks ----------------------------------------------------------------------------------

    def _import(self, origin: Origin) -> type[Method]:
        try:
            kind = EntryPoint(name=origin.name, value=origin.value, group=GROUP).load()
        except (Exception, SystemExit) as error:
            raise RegistryError(
                f"method {origin.name!r} failed to import",
                saw=f"{type(error).__name__}: {error} in {origin.distribution} {origin.version}",
                do=f"fix or reinstall {origin.distribution}; other methods are unaffected",
            ) from error
        if not (
            inspect.isclass(kind) and issubclass(kind, Method) and getattr(kind, "id", None) == origin.name
        ):
            raise RegistryError(
                f"the entry point {origin.name!r} does not name a method of that id",
                saw=f"{origin.value} is {kind!r} with id {getattr(kind, 'id', None)!r}",
                do=f"point it at a subclass of inlay.method.Method with id = {origin.name!r}",
            )
        return kind

    def _adopt(self, kind: type[Method]) -> Any:
        if kind not in self._adopted:
            self.check(kind)
            plugin = _Plugin(kind)
            self._manager.register(plugin)
            self._adopted[kind] = plugin
        return self._adopted[kind]

    def check(self, kind: type[Method]) -> None:
        """Refuse what pluggy would accept and then not call, or call wrongly."""
        if kind in self._adopted:
            return
        if not isinstance(getattr(kind, "id", None), str):
            raise RegistryError(
                f"the method class {kind.__name__} has no id",
                saw=f"id = {shown(getattr(kind, 'id', None))}",
                do='give it a class attribute: id: ClassVar[str] = "…"',
            )
        marked = marked_in(kind)
        if wrong := miswritten(marked):
            raise self._rejected(kind, wrong)
        for flag, hook in (("prepares", "prepare"), ("calibrates", "calibrate")):
            declared = getattr(kind, flag)  # a property where settings decide
            if declared is True and hook not in marked:
                raise self._rejected(kind, f"{flag} is true, but there is no {hook} hook")
            if declared is False and hook in marked:
                raise self._rejected(kind, f"its {hook} hook would never be called: {flag} is not true")
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
        self.__dict__.update(marked_in(kind))


def load_one(group: str, what: str, name: str) -> Any:
    """Return the object an installed package offers under `name` in a group; a class is instantiated."""
    found: dict[str, dict[Origin, EntryPoint]] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, {}).setdefault(_origin(entry), entry)
    if name not in found:
        raise RegistryError(
            f"no installed package offers the {what} {name!r}",
            saw=f"{what}s here: {', '.join(sorted(found)) or 'none'}",
            do="install the package that has it",
        )
    if len(found[name]) > 1:
        raise RegistryError(
            f"{what} {name!r} is offered more than once",
            saw=_several(found[name]),
            do="uninstall one of them",
        )
    ((origin, entry),) = found[name].items()
    try:
        made = entry.load()
        return made() if inspect.isclass(made) else made
    except (Exception, SystemExit) as error:
        raise RegistryError(
            f"the {what} {name!r} failed to import",
            saw=f"{type(error).__name__}: {error} in {origin.distribution} {origin.version}",
            do=f"fix or reinstall {origin.distribution}, or leave it out",
        ) from error


@cache
def _origin_of(kind: type[Method]) -> Origin:
    """Return the origin of the entry point that names this very class, or where the class was written."""
    for entry in entry_points(group=GROUP, name=kind.id):
        if getattr(sys.modules.get(entry.module), entry.attr, None) is kind:
            return _origin(entry)
    return Origin(kind.id, kind.__module__.split(".")[0], "", f"{kind.__module__}:{kind.__qualname__}")


def _origin(entry: EntryPoint) -> Origin:
    distribution = entry.dist
    if distribution is None:
        return Origin(entry.name, entry.value.split(":")[0].split(".")[0], "", entry.value)
    return Origin(entry.name, distribution.metadata["Name"], distribution.version, entry.value)


def _several(offers: Iterable[Origin]) -> str:
    return " and ".join(f"{o.distribution} {o.version} ({o.value})" for o in offers)


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def _limited() -> str:
    """Say that the environment limits which packages are seen, if it does."""
    chosen = os.environ.get("INLAY_LOAD_PLUGINS")
    return "" if chosen is None else f" (INLAY_LOAD_PLUGINS={chosen!r} hides others)"


def _package_of(name: str) -> str:
    """Guess which of our own packages a method would come in; the naming rule is inlay-<family>."""
    return f"the inlay-* package that has {shown(name)} (see the table of methods in the docs)"


def _print_call(hook_name: str, _impls: Any, arguments: Any) -> None:
    method = arguments.get("method")
    print(f"inlay: {hook_name}({getattr(method, 'id', method)!r})", file=sys.stderr)


registry = Registry()
