"""Settings of a method: declared with a range, checked by type, turned into plain data."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

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


def check_setting(owner: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """Return `value` (lists as tuples) if it fits the field's annotation and range, else raise."""
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
    """Return lists as tuples, so that a configuration can be hashed and compared."""
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
        return isinstance(value, dict) and all(fits(v, arguments[1]) for v in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """Return an annotation in words a user can act on."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    return str(hint).replace("typing.", "").replace("<class '", "").replace("'>", "")


def plain(value: Any) -> Any:
    """Return `value` as JSON types; a method inside becomes {"method": id, "settings": {...}}."""
    from inlay.method import Method

    if isinstance(value, Method):
        return {"method": value.id, "settings": value.to_dict()}
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def from_plain(owner: type, settings: dict[str, Any], build: Any) -> Any:
    """Return `owner(**settings)`, building methods inside with `build(id, settings)`."""
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
    return owner(**{name: _built(value, build) for name, value in settings.items()})


def _built(value: Any, build: Any) -> Any:
    if isinstance(value, dict) and is_method(value):
        return build(value["method"], value["settings"])
    if isinstance(value, dict):
        return {k: _built(v, build) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_built(v, build) for v in value)
    return value


def is_method(value: dict[str, Any]) -> bool:
    """Return whether plain data stands for a method (see `plain`)."""
    return (
        value.keys() == {"method", "settings"}
        and isinstance(value["method"], str)
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
