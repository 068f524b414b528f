"""Hyperparameters out of range, misspelt, of the wrong type, NaN: for every installed method and field."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import pytest

import inlay
from inlay.errors import ConfigError
from inlay.method import Method
from inlay.registry import registry
from inlay.settings import _hints, from_plain, setting
from inlay.stack import parse
from inlay.testing.models import build
from inlay.testing.refusal import refused
from inlay_lora import LoRA

METHODS = {name: registry.get(name) for name in sorted(registry.origins())}  # not those of other tests
FIELDS = [
    pytest.param(kind, field, id=f"{name}.{field.name}")
    for name, kind in METHODS.items()
    for field in dataclasses.fields(kind)
]


def options(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of an annotation."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def wrong_values(hint: Any) -> Iterator[Any]:
    """Yield values that an annotation does not allow, whatever it is."""
    allowed = options(hint)
    yield object()
    yield b"8"
    yield {1, 2}
    yield 1j
    if Any in allowed:
        return
    if type(None) not in allowed:
        yield None
    if bool not in allowed and not any(get_origin(a) is Literal and True in get_args(a) for a in allowed):
        yield True
    if str not in allowed:
        yield "no such choice"
    if int in allowed and float not in allowed:
        yield 1.5
        yield 8.0
    if not {int, float} & {*allowed} and str not in allowed:  # layers=5 means layer 5
        yield 12345
    if any(get_origin(a) is tuple for a in allowed):
        yield (object(),)
        yield [["nested"]]


def out_of_range(field: dataclasses.Field[Any], hint: Any) -> Iterator[float]:
    """Yield numbers outside a field's declared range; for any number, what is not finite."""
    numbers = {int, float} & {*options(hint)}
    step = 1 if int in numbers and float not in numbers else 1e-3
    bounds = field.metadata
    if not numbers:
        return
    if "least" in bounds:
        yield bounds["least"] - step
    if "most" in bounds:
        yield bounds["most"] + step
    if "above" in bounds:
        yield bounds["above"]
    if "below" in bounds:
        yield bounds["below"]
    yield 10**30
    yield -(10**30)
    if float in numbers:
        yield from (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_a_value_of_the_wrong_type_is_refused(kind: type[Method], field: dataclasses.Field[Any]) -> None:
    values = list(wrong_values(_hints(kind)[field.name]))
    assert len(values) >= 4
    for value in values:
        with refused(
            ConfigError, rf"{kind.__name__}: {field.name} (has the wrong type or value|is out of range)"
        ):
            kind(**{field.name: value})


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_a_number_out_of_range_is_refused(kind: type[Method], field: dataclasses.Field[Any]) -> None:
    hint = _hints(kind)[field.name]
    values = list(out_of_range(field, hint))
    assert values or not {int, float} & {*options(hint)}
    for value in values:
        with refused(ConfigError, rf"{kind.__name__}: {field.name} is out of range"):
            kind(**{field.name: value})
        if abs(value) < math.inf:
            with refused(ConfigError, "is out of range"):
                parse(f"{kind.id}({field.name}={value!r})")


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_a_misspelt_setting_is_refused_with_the_right_one(
    kind: type[Method], field: dataclasses.Field[Any]
) -> None:
    wrong = field.name[:-2] + field.name[:-3:-1] + "x"
    match = rf"{kind.__name__} has no setting '{wrong}'[\s\S]*did you mean .*'{field.name}'"
    with refused(ConfigError, match):
        kind(**{wrong: 1})
    with refused(ConfigError, match):
        parse(f"{kind.id}({wrong}=1)")
    with refused(ConfigError, match):
        from_plain(kind, {wrong: 1}, registry.build)


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_every_number_declares_a_range(kind: type[Method]) -> None:
    """Without one, `rank=-1` would reach torch: a stack trace in place of an error."""
    for field in dataclasses.fields(kind):
        if int in options(_hints(kind)[field.name]) and field.name != "layers":
            assert {"least", "above"} & field.metadata.keys(), field.name


def test_numbers_inside_lists_are_checked() -> None:
    @dataclasses.dataclass(frozen=True)
    class Many(Method):
        id = "many"
        scales: tuple[float, ...] = setting((1.0,), above=0)
        by_name: dict[str, float] = setting(None, most=2)

    assert Many(scales=[1, 2.5], by_name={"a": 1}).scales == (1, 2.5)
    for bad in ({"scales": [1.0, math.nan]}, {"scales": (0.0,)}, {"by_name": {"a": 1.0, "b": math.inf}}):
        with refused(ConfigError, "is out of range"):
            Many(**{"by_name": {}, **bad})


def test_an_integer_that_cannot_be_written_out_is_refused() -> None:
    with refused(ConfigError, r"LoRA: rank is out of range[\s\S]*a int that cannot be written out"):
        LoRA(rank=10**5000)


def test_a_choice_lists_the_choices() -> None:
    with refused(ConfigError, r"LoRA: bias has the wrong type[\s\S]*do:  give one of '\w+', '\w+'"):
        LoRA(bias="zeros")


def test_a_setting_that_is_needed_and_missing_is_refused() -> None:
    @registry.register
    @dataclasses.dataclass(frozen=True)
    class Needy(Method):
        id = "needy"
        inner: str = setting()

    try:
        for settings in ({}, {"targets": ["query"]}):
            with refused(ConfigError, "Needy needs the setting 'inner'"):
                from_plain(Needy, settings, registry.build)
        with refused(ConfigError, "Needy needs the setting 'inner'"):
            parse("needy")
        assert parse("needy(inner='x')").parts[0].method == Needy(inner="x")
    finally:
        registry.forget(Needy)


def test_methods_inside_settings_come_back() -> None:
    @registry.register
    @dataclasses.dataclass(frozen=True)
    class Holder(Method):
        id = "holder"
        one: Any = setting(None)
        many: tuple[Any, ...] = setting(())
        named: dict[str, Any] = setting(None)

    try:
        held = Holder(one=LoRA(rank=2), many=[LoRA(rank=3)], named={"a": LoRA(rank=4)})
        assert registry.build("holder", held.to_dict()) == held
    finally:
        registry.forget(Holder)


def test_settings_in_text_leave_the_model_alone() -> None:
    model = build("llama")
    for text in (
        "lora(rank=0)",
        "lora(rnak=8)",
        "lora(rank='8')",
        "lora(dropout=1.0)",
        "lora + lora(rank=None)",
    ):
        with refused(ConfigError, "LoRA", model=model):
            inlay.attach(model, text)
