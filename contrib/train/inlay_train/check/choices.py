"""Configurations of a method made from what its settings declare: types, ranges, defaults."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from inlay.errors import ConfigError, RegistryError
from inlay.method import Method
from inlay.settings import strategies

PLACES = ("targets", "layers")
Bounds = Mapping[str, Any]


def configurations(kind: type[Method]) -> Iterator[Method]:
    """Yield methods configured small, then as by default, then small but for one setting."""
    hints = typing.get_type_hints(kind)
    fields = [f for f in dataclasses.fields(kind) if f.name not in PLACES]
    choices = {f.name: _values(f, hints[f.name]) for f in fields}
    if empty := [name for name, found in choices.items() if not found]:
        raise RegistryError(
            f"no value can be derived for the setting {empty[0]!r} of {kind.id!r}",
            saw=f"it has no default, and its type is {hints[empty[0]]}",
            do="declare a conformance class: docs/conformance.md#joining",
        )
    default = {name: found[0] for name, found in choices.items()}
    small = {n: next((v for v in found[1:] if hints[n] is int), found[0]) for n, found in choices.items()}
    varied = [{**small, name: value} for name, found in choices.items() for value in found]
    seen: list[Method] = []
    for settings in (small, default, *varied):
        try:
            method = kind(**settings)
        except ConfigError:  # settings that exclude each other
            continue
        if method not in seen:
            seen.append(method)
            yield method


def _values(field: dataclasses.Field[Any], hint: Any) -> list[Any]:
    """Return values of a setting: its default if there is one, then what its type and range give."""
    found = []
    if field.default is not dataclasses.MISSING:
        found.append(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        found.append(field.default_factory())
    found += _of_type(hint, field.metadata, found[0] if found else None)
    return [value for i, value in enumerate(found) if value not in found[:i]]


def _of_type(hint: Any, bounds: Bounds, default: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [value for inner in get_args(hint) for value in _of_type(inner, bounds, default)]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if hint in (bool, type(None)):
        return [True, False] if hint is bool else [None]
    if hint in (int, float):
        return _integers(bounds) if hint is int else _floats(bounds, default)
    return [kind() for kind in strategies(hint).values() if all(map(_has_default, dataclasses.fields(kind)))]


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return not field.default is field.default_factory is dataclasses.MISSING


def _integers(bounds: Bounds) -> list[int]:
    """Return the two least values of a range; zero comes last."""
    low = bounds.get("least", bounds["above"] + 1 if "above" in bounds else None)
    if low is None:
        return []
    high = min(bounds.get("most", low + 1), bounds["below"] - 1 if "below" in bounds else low + 1, low + 1)
    return sorted(range(int(low), int(high) + 1), key=lambda value: (value == 0, value))


def _floats(bounds: Bounds, default: Any) -> list[float]:
    """Return what lies halfway from the default to each bound; without a default, between the bounds."""
    ends = [bounds[k] for k in ("least", "above", "most", "below") if k in bounds]
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        return [(default + end) / 2 for end in ends]
    return [sum(ends) / len(ends)] if len(ends) == 2 else []
