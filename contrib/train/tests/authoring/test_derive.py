"""Conformance classes derived for methods that declare none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from torch import Tensor

from inlay.authoring import At, Init, Method, Site, Strategy, setting
from inlay.errors import RegistryError
from inlay.registry import registry
from inlay.testing.neighbours import Bend
from inlay_train.check import derive
from inlay_train.check.choices import configurations


@dataclass(frozen=True, kw_only=True)
class Start(Strategy):
    """Where it starts."""


@dataclass(frozen=True, kw_only=True)
class Flat(Start):
    """A start without settings."""

    id: ClassVar[str] = "flat"
    size: int = setting(1, least=1)


@dataclass(frozen=True, kw_only=True)
class Chosen(Start):
    """A start that needs a setting."""

    id: ClassVar[str] = "chosen"
    size: int = setting(least=1)


@dataclass(frozen=True, kw_only=True)
class Many(Method):
    """Settings of each type."""

    id: ClassVar[str] = "many"
    rank: int = setting(8, least=2)
    warmup: int = setting(0, least=0)
    few: int = setting(3, least=3, most=3)
    free: int = setting(5)
    needed: int = setting(above=0, below=9)
    dropout: float = setting(0.0, least=0.0, below=1.0)
    share: float = setting(above=0.0, below=1.0)
    scale: float | Literal["learned"] = setting(2.0, above=0.0)
    kind: Literal["a", "b"] = "a"
    bias: bool = False
    size: int | None = setting(None, least=1)
    start: Start | None = None
    words: tuple[str, ...] = ("x",)


def test_each_setting_is_varied_within_its_range() -> None:
    found = list(configurations(Many))
    small, default = found[:2]
    assert (small.rank, small.warmup, small.few, small.free, small.needed) == (2, 1, 3, 5, 2)
    assert (default.rank, default.warmup, default.needed, default.share) == (8, 0, 1, 0.5)
    varied = {name: {getattr(m, name) for m in found} for name in small.to_dict()}
    assert varied["rank"] == {2, 3, 8}
    assert varied["warmup"] == {0, 1}
    assert varied["few"] == {3}
    assert varied["needed"] == {1, 2}
    assert varied["dropout"] == {0.0, 0.5}
    assert varied["scale"] == {2.0, 1.0, "learned"}
    assert varied["kind"] == {"a", "b"}
    assert varied["bias"] == {False, True}
    assert varied["size"] == {None, 1, 2}
    assert varied["start"] == {None, Flat()}
    assert len(found) == len(set(found)) < 20


@dataclass(frozen=True, kw_only=True)
class Inside(Method):
    """A method that needs another one."""

    id: ClassVar[str] = "inside"
    part: Method


def test_a_setting_of_which_no_value_is_known() -> None:
    with pytest.raises(
        RegistryError, match="no value can be derived for the setting 'part' of 'inside'"
    ) as caught:
        list(configurations(Inside))
    assert "it has no default" in caught.value.saw
    assert "declare a conformance class" in caught.value.do


@dataclass(frozen=True, kw_only=True)
class OnCross(Method):
    """Acts on what only encoder-decoders have."""

    id: ClassVar[str] = "on_cross"
    default_targets: ClassVar[tuple[str, ...]] = ("cross_attention",)

    def delta(self, site: Site, init: Init) -> Bend:
        return Bend(site, init)


@dataclass(frozen=True, kw_only=True)
class Nowhere(OnCross):
    """Acts on nothing the kit has."""

    id: ClassVar[str] = "nowhere"
    default_targets: ClassVar[tuple[str, ...]] = ("no_such_layer",)


@pytest.fixture
def registered(request: pytest.FixtureRequest) -> Any:
    registry.register(request.param)
    yield request.param
    registry.forget(request.param)


@pytest.mark.parametrize("registered", [OnCross], indirect=True)
def test_where_a_method_acts_and_that_it_does_not_merge(registered: type[Method]) -> None:
    kind = derive.conformance_of("on_cross")
    assert kind.__name__ == "TestOnCross"
    assert kind.families == ("t5",)
    assert kind.merges is False
    assert kind.by_layer
    assert hasattr(kind, "test_R14_refuses_to_merge")
    assert not hasattr(kind, "test_R09_merges_exactly")


@pytest.mark.parametrize("registered", [Nowhere], indirect=True)
def test_a_method_that_acts_on_nothing(registered: type[Method]) -> None:
    with pytest.raises(RegistryError, match="'nowhere' acts on none of the kit's models") as caught:
        derive.conformance_of("nowhere")
    assert "on llama: " in caught.value.saw
    assert "no_such_layer" in caught.value.saw


class Third(Bend):
    """Bend, and what is lost when y is divided by three and multiplied again."""

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        return super().forward(x, y, at) + (y / 3 * 3 - y)


@dataclass(frozen=True, kw_only=True)
class Rounding(Method):
    """Hardly changes anything at the start, but does."""

    id: ClassVar[str] = "rounding"

    def delta(self, site: Site, init: Init) -> Third:
        return Third(site, init)


@pytest.mark.parametrize("registered", [Rounding, OnCross], indirect=True)
def test_whether_a_method_rounds_at_the_start(registered: type[Method]) -> None:
    assert derive.rounds(registered(), "t5") is (registered is Rounding)


def test_what_is_derived_for_a_method_of_ours_is_what_it_declares() -> None:
    """Beside its classes in plugins/selective/tests: where there are biases, it merges."""
    bitfit = derive.conformance_of("bitfit")
    assert bitfit.families == ("gpt2", "bert", "vit")
    assert (bitfit.merges, bitfit.start_tolerance, bitfit.adds_biases) == (True, 0.0, False)
    assert derive.quantised(registry.get("ia3")())
    assert not derive.quantised(registry.get("bitfit")())  # llama has no biases


def test_merging_by_configuration_and_family() -> None:
    """SSF gives a bias to layers without one, and does not merge into norms that have no place for it."""
    kind = registry.get("ssf")
    linear, default = kind(targets=("linear",)), kind()
    found = {(m, "llama"): derive.tried(m, "llama") for m in (linear, default)}
    assert [t.adds_biases for t in found.values()] == [True, False]
    abilities = derive.abilities(
        {(default, "llama"): derive.Tried(), (default, "bert"): derive.Tried(merges=True)}
    )
    assert not abilities["merges"](kind(layers=(1,)), "llama")
    assert abilities["merges"](kind(layers=(1,)), "bert")
    assert [t.merges for t in found.values()] == [True, False]
