"""Settings of methods and strategies: declared with a range, checked by type, turned into plain data."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, NoReturn, Self, Union, get_args, get_origin

from inlay.errors import ConfigError, near, shown

MAX_INT = 2**53  # beyond it a float no longer holds every integer


def setting(
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a hyperparameter with its default and range (`least <= v <= most`, `above < v < below`)."""
    bounds = {"least": least, "most": most, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={k: v for k, v in bounds.items() if v is not None})


class FrozenDict(dict[str, Any]):
    """A mapping in a setting: a dict that cannot change, and so can be hashed. As JSON it is an object."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)

    def _unchanging(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(
            "a setting does not change",
            saw=shown(dict(self)),
            do="make another configuration: dataclasses.replace(method, ...)",
        )

    __setitem__ = __delitem__ = __ior__ = _unchanging  # type: ignore[assignment]
    update = setdefault = pop = popitem = clear = _unchanging  # type: ignore[assignment]


class Configured:
    """Settings as data: checked when made, written as JSON types. Subclasses are frozen dataclasses."""

    id: ClassVar[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in kwargs.keys() - names:
            raise ConfigError(
                f"{cls.__name__} has no setting {name!r}",
                saw=f"{name}={shown(kwargs[name])}",
                do=near(name, names),
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = check_setting(type(self), field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data (JSON types; methods and strategies inside become dicts)."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Strategy(Configured):
    """A choice within a method's settings that has settings of its own, named by its `id`.

    A setting annotated with a class of strategies takes every subclass of it that has an `id`. As
    text it reads like a method, in files it is {"strategy": id, "settings": {...}}.
    """


def check_setting(owner: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """Return `value`, made unchangeable, if it fits the field's annotation and range, else raise."""
    if field.name == "layers" and isinstance(value, (int, range)) and not isinstance(value, bool):
        value = (value,) if isinstance(value, int) else tuple(value)
    value = frozen(value)
    hint = _hints(owner)[field.name]
    if not fits(value, hint):
        raise ConfigError(
            f"{owner.__name__}: {field.name} has the wrong type or value",
            saw=f"{field.name}={shown(value)} ({type(value).__name__})",
            do=f"give {describe(hint)}",
        )
    _check_range(owner, field, value)
    return value


def frozen(value: Any) -> Any:
    """Return lists as tuples, dicts as `FrozenDict`: a configuration can be hashed and compared."""
    if isinstance(value, dict):
        return FrozenDict({key: frozen(v) for key, v in value.items()})
    return tuple(frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def fits(value: Any, hint: Any) -> bool:
    """Return whether `value` is of the annotated type; an int passes for a float, a bool for neither."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin is tuple:
        inner = arguments[0] if arguments else Any
        return isinstance(value, tuple) and all(fits(v, inner) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            isinstance(k, str) and fits(v, arguments[1]) for k, v in value.items()
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """Return an annotation in words a user can act on."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    if choices := strategies(hint):
        return "one of " + ", ".join(f"{kind.__name__}(...)" for kind in choices.values())
    return str(hint).replace("typing.", "").replace("<class '", "").replace("'>", "")


def plain(value: Any) -> Any:
    """Return `value` as JSON types; what is configured inside becomes {"method": id, "settings": {...}}."""
    if isinstance(value, Configured):
        sort = "strategy" if isinstance(value, Strategy) else "method"
        return {sort: value.id, "settings": value.to_dict()}
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def from_plain(owner: type, settings: dict[str, Any], build: Any) -> Any:
    """Return `owner(**settings)`, strategies inside built here, methods inside with `build(id, settings)`."""
    known = {f.name: f for f in dataclasses.fields(owner)}
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ConfigError(
            f"{owner.__name__} has no setting {shown(unknown[0])}",
            saw=f"{shown(unknown[0])}={shown(settings[unknown[0]])}",
            do=near(unknown[0], known),
        )
    required = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in settings]:
        raise ConfigError(
            f"{owner.__name__} needs the setting {missing[0]!r}",
            saw=f"settings given: {', '.join(map(repr, settings)) or 'none'}",
            do=f"give {missing[0]}=...",
        )
    hints = _hints(owner)
    places = {name: f"{owner.__name__}: {name}" for name in settings}
    return owner(**{n: _built(value, places[n], hints[n], build) for n, value in settings.items()})


def _built(value: Any, place: str, hint: Any, build: Any) -> Any:
    if isinstance(value, list):
        return tuple(_built(v, place, hint, build) for v in value)
    if not isinstance(value, dict):
        return value
    choices = strategies(hint)
    sort = next((s for s in ("strategy", "method") if _is_named(value, s)), "")
    if sort and choices:  # text does not say which of the two it names
        if value[sort] not in choices:
            raise ConfigError(
                f"{place} has no strategy of that name", saw=shown(value[sort]), do=near(value[sort], choices)
            )
        return from_plain(choices[value[sort]], value["settings"], build)
    if sort == "method":
        return build(value["method"], value["settings"])
    return {k: _built(v, place, hint, build) for k, v in value.items()}


def strategies(hint: Any) -> dict[str, type[Strategy]]:
    """Return the strategies that a setting of this annotation takes, by id."""
    if isinstance(hint, type) and issubclass(hint, Strategy):
        return {kind.id: kind for kind in _kinds(hint) if "id" in vars(kind)}
    return {name: kind for argument in get_args(hint) for name, kind in strategies(argument).items()}


def _kinds(kind: type[Strategy]) -> Iterator[type[Strategy]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from _kinds(inner)


def is_method(value: dict[str, Any]) -> bool:
    """Return whether plain data stands for a method (see `plain`)."""
    return _is_named(value, "method")


def _is_named(value: dict[str, Any], sort: str) -> bool:
    return (
        value.keys() == {sort, "settings"}
        and isinstance(value[sort], str)
        and isinstance(value["settings"], dict)
    )


@cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _check_range(owner: type, field: dataclasses.Field[Any], value: Any) -> None:
    if isinstance(value, (tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_range(owner, field, item)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    bounds = field.metadata
    inside = (
        abs(value) <= (MAX_INT if isinstance(value, int) else sys.float_info.max)
        and value >= bounds.get("least", -math.inf)
        and value <= bounds.get("most", math.inf)
        and value > bounds.get("above", -math.inf)
        and value < bounds.get("below", math.inf)
    )
    if not inside:
        signs = {"least": ">=", "most": "<=", "above": ">", "below": "<"}
        wanted = " and ".join(f"{signs[k]} {v}" for k, v in bounds.items()) or "a finite number"
        raise ConfigError(
            f"{owner.__name__}: {field.name} is out of range",
            saw=f"{field.name}={shown(value)}",
            do=f"give a finite {field.name} {wanted}" if bounds else f"give {wanted}",
        )
