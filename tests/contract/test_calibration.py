"""Calibration in core: what `calibrate` sees, composites, strategies as data, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from contract_checks import offered
from torch import Tensor, nn

import inlay
from inlay.authoring import (
    Adapter,
    Composite,
    Delta,
    Init,
    Method,
    OutputDelta,
    Site,
    Strategy,
    calls,
    gradients,
    hookimpl,
    rows,
    setting,
)
from inlay.authoring.sparse import largest
from inlay.errors import ConfigError, RegistryError
from inlay.registry import registry
from inlay.settings import plain
from inlay.stack import Stack, need_state
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay.testing.snapshots import differences, snapshot


class Scaled(OutputDelta):
    """Δy = g·y / m, g (1,) = 0 at the start, m a number measured before."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, init: Init, mean: Tensor) -> None:
        super().__init__()
        self.gain = init.zeros(1)
        self.register_buffer("mean", mean.detach().clone())

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return self.gain * y / self.mean


@dataclass(frozen=True)
class Power(Strategy):
    """What is measured: a mean of |y|^p."""

    def of(self, y: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Mean(Power):
    """|y|^p with p ≥ 1."""

    id: ClassVar[str] = "mean"
    p: float = setting(1.0, least=1)

    def of(self, y: Tensor) -> Tensor:
        return (y.abs() ** self.p).mean()


@dataclass(frozen=True)
class Root(Power):
    """√|y|."""

    id: ClassVar[str] = "root"

    def of(self, y: Tensor) -> Tensor:
        return y.abs().sqrt().mean()


@dataclass(frozen=True)
class Measured(Method):
    """Δy = g·y / m. Parameters: 1 per site."""

    id: ClassVar[str] = "measured"
    default_targets: ClassVar[tuple[str, ...]] = ("query",)
    calibrates: ClassVar[bool] = True
    power: Power = setting(Mean())
    powers: tuple[Power, ...] = setting(())

    @staticmethod
    @hookimpl
    def calibrate(
        method: Measured, model: nn.Module, sites: Sequence[Site], batches: Iterable[Any]
    ) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        with ExitStack() as hooks, torch.no_grad():
            for site in sites:
                keep = partial(method.keep, found[site.name])
                hooks.callback(site.module.register_forward_hook(keep).remove)
            for call in calls(model, batches):
                model(**call)
        return {name: torch.stack(means).mean() for name, means in found.items()}

    def keep(self, found: list[Tensor], module: nn.Module, args: Any, y: Tensor) -> None:
        found.append(self.power.of(y))

    @staticmethod
    @hookimpl
    def inject(method: Measured, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        for site in sites:
            mean = torch.zeros(()) if adapter.meta else adapter.calibration[site.name]
            adapter.place(site, Scaled(adapter.init(site), mean))
        return len(sites)


class Both(OutputDelta):
    """The sum of children's changes."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, children: Mapping[str, Sequence[Delta]]) -> None:
        super().__init__()
        self.names = list(children)
        self.parts = nn.ModuleList([own[0] for own in children.values()])

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return sum(part(x, y, at.part(n)) for n, part in zip(self.names, self.parts, strict=True))


@dataclass(frozen=True, kw_only=True)
class Pair(Composite):
    """Two methods at once. Parameters: both's."""

    id: ClassVar[str] = "pair"
    first: Method = setting(Measured())
    second: Method = setting(Measured(targets=("query", "key"), power=Root()))

    def parts(self) -> dict[str, Method]:
        return {"first": self.first, "second": self.second}

    def combine(self, site: Site, children: Mapping[str, Sequence[Delta]], init: Init) -> Delta:
        return Both(children)


@pytest.fixture(autouse=True)
def methods() -> Iterator[None]:
    with offered(Measured, Pair):
        yield


def data(count: int = 2) -> list[dict[str, Any]]:
    return [batch_for(build("llama"), seed=seed) for seed in range(count)]


def measured(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return need_state(model).adapter_of(name).measured


# -- what calibrate sees -------------------------------------------------------------------------


def test_it_sees_the_bare_model_in_evaluation_mode_and_leaves_no_trace() -> None:
    plain_model, model = build("llama"), build("llama", attention_dropout=0.5)
    inlay.attach(plain_model, Measured(), data=data())
    inlay.attach(model, "lora(start=gaussian(), targets=['linear'])", "before")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.3)
    model.train()
    model.model.layers[0].eval()
    before = snapshot(model)
    inlay.attach(model, Measured(), "fr", data=data())
    found, expected = measured(model, "fr"), measured(plain_model)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    inlay.detach(model, "fr")
    assert differences(before, model) == []


def test_modes_come_back_after_a_failure() -> None:
    model = build("llama").train()
    with refused(ConfigError, "a batch to calibrate on is a mapping of the model's arguments", model=model):
        inlay.attach(model, Measured(), data=[3])
    assert model.training


def test_an_iterator_serves_each_part_and_each_pass() -> None:
    one, two = build("llama"), build("llama")
    stack = Measured().named("a") + Measured(targets=["key"]).named("b") + Pair().named("c")
    inlay.attach(one, stack, data=data())
    inlay.attach(two, stack, data=(batch for batch in data()))
    for path in ("a", "b", "c"):
        first, second = (measured(model, f"default/{path}") for model in (one, two))
        assert first
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_calls_go_to_the_model_s_device_and_rows_are_batches_of_one() -> None:
    model = build("bert")
    batch = {
        **batch_for(model, rows=3, labels=True),
        "position_ids": torch.arange(7)[None],
        "return_dict": True,
    }
    (call,) = calls(model, [batch])
    one = list(rows(call))
    assert [row["input_ids"].shape for row in one] == [(1, 7)] * 3
    assert [int(row["labels"][0]) for row in one] == batch["labels"].tolist()
    assert all(row["position_ids"].shape == (1, 7) and row["return_dict"] for row in one)
    assert list(rows({"flag": True})) == [{"flag": True}]


def test_gradients_leave_flags_and_gradients_alone() -> None:
    model = build("bert")
    weight = model.classifier.weight.requires_grad_(False)
    model.bert.pooler.dense.bias.grad = torch.ones(32)
    batch = batch_for(model, labels=True)
    model(**batch)
    before = snapshot(model)
    (found,) = gradients(model, [batch], {id(weight)})
    assert differences(before, model) == []
    weight.requires_grad_(True)
    (expected,) = torch.autograd.grad(model(**batch).loss, [weight])
    assert list(found) == [id(weight)]
    torch.testing.assert_close(found[id(weight)], expected)


def test_largest_takes_exactly_as_many_and_the_first_of_equal_ones() -> None:
    scores = {"a": torch.tensor([[0.0, 2.0], [0.0, 1.0]]), "b": torch.zeros(3), "c": torch.tensor([1.0])}
    for count, expected in {
        1: {"a": [1]},
        2: {"a": [1, 3]},
        3: {"a": [1, 3], "c": [0]},
        4: {"a": [0, 1, 3], "c": [0]},
        7: {"a": [0, 1, 2, 3], "b": [0, 1], "c": [0]},
    }.items():
        assert {name: indices.tolist() for name, indices in largest(scores, count).items()} == expected
    with refused(ConfigError, r"a score is not finite, so no entries can be chosen by it\n  saw: b"):
        largest({"a": torch.zeros(2), "b": torch.tensor([torch.nan])}, 1)


# -- composites ----------------------------------------------------------------------------------


def test_the_methods_inside_a_composite_measure_for_themselves(tmp_path: Path) -> None:
    model, alone = build("llama"), build("llama")
    inlay.attach(model, Pair(), data=data())
    inlay.attach(alone, Measured(targets=["query", "key"], power=Root()), data=data())
    found, expected = measured(model), measured(alone)
    sites = {n.rsplit(".", 1)[1] for n in found}
    assert sites == {"q_proj", "k_proj"}
    assert {n.partition("/")[0] for n in found} == {"first", "second"}
    assert all(torch.equal(found[f"second/{name}"], tensor) for name, tensor in expected.items())
    inlay.save(model, tmp_path)
    fresh = build("llama")
    inlay.load(fresh, tmp_path)
    assert torch.equal(fresh(**data()[0]).logits, model(**data()[0]).logits)
    assert measured(fresh).keys() == found.keys()


def test_a_composite_whose_children_see_no_data_needs_none() -> None:
    model = build("llama")
    inlay.attach(model, Pair(first=registry.build("lora", {}), second=registry.build("ia3", {})))
    assert measured(model) == {}
    with refused(ConfigError, "'pair' must see data before it is placed"):
        inlay.attach(model, Pair(), "second")


# -- strategies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("measured(power=mean(p=2.5))", Measured(power=Mean(p=2.5))),
        ("measured(power=root())", Measured(power=Root())),
        ("pair(first=measured(power=mean(p=3)))", Pair(first=Measured(power=Mean(p=3)))),
    ],
)
def test_a_strategy_is_written_as_data(text: str, method: Method) -> None:
    assert Stack.of(text).parts[0].method == method
    settings = json.loads(json.dumps(method.to_dict()))
    again = registry.build(method.id, settings)
    assert again == method
    assert hash(again) == hash(method)


def test_a_strategy_has_a_form_of_its_own_in_files() -> None:
    assert plain(Mean(p=2)) == {"strategy": "mean", "settings": {"p": 2}}
    method = registry.build("measured", {"powers": [plain(Root()), plain(Mean())]})
    assert method == Measured(powers=(Root(), Mean()))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "measured(power=men(p=2))",
            ConfigError,
            r"Measured: power has no strategy of that name[\s\S]*'mean'",
        ),
        ("measured(power=measured())", ConfigError, "Measured: power has no strategy of that name"),
        ("measured(power=mean(q=2))", ConfigError, r"Mean has no setting 'q'"),
        ("measured(power=mean(p=0.5))", ConfigError, "Mean: p is out of range"),
        ("measured(power='mean')", ConfigError, r"one of Mean\(...\), Root\(...\)"),
        ("measured(layers=mean())", RegistryError, "no installed package offers the method 'mean'"),
    ],
)
def test_what_is_no_strategy_is_refused(text: str, error: type[Any], message: str) -> None:
    with refused(error, message):
        Stack.of(text)


def test_a_file_cannot_choose_a_strategy_where_none_is_taken() -> None:
    with refused(ConfigError, "Measured: layers has the wrong type or value"):
        registry.build("measured", {"layers": plain(Root())})
    with refused(ConfigError, "Measured: power has no strategy of that name"):
        registry.build("measured", {"power": {"strategy": "Mean", "settings": {}}})


# -- refusals ------------------------------------------------------------------------------------


def test_data_must_give_batches() -> None:
    model = build("llama")
    with refused(ConfigError, r"data is nothing that gives batches\n  saw: a int", model=model):
        inlay.attach(model, Measured(), data=3)  # type: ignore[arg-type]
    with refused(ConfigError, "there is nothing to calibrate on", model=model):
        inlay.attach(model, Measured(), data=[])


def test_adapters_of_different_calibration_are_not_combined() -> None:
    model = build("llama")
    inlay.attach(model, Measured(), "fr", data=data())
    inlay.attach(model, Measured(), "de", data=data())
    inlay.attach(model, Measured(), "it", data=data(1))
    inlay.combine(model, {"fr": 1.0, "de": 1.0}, name="mix", how="tensors")
    with refused(
        ConfigError, r"adapters of different calibration cannot be combined[\s\S]*'it/", model=model
    ):
        inlay.combine(model, {"fr": 1.0, "it": 1.0}, name="mixed", how="tensors")


def test_the_flag_and_the_hook_go_together() -> None:
    @dataclass(frozen=True)
    class Silent(Measured):
        id: ClassVar[str] = "silent"
        calibrates: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Empty(Method):
        id: ClassVar[str] = "empty"
        calibrates: ClassVar[bool] = True

    for kind, message in (
        (Silent, "its calibrate hook would never be called: calibrates is not true"),
        (Empty, "calibrates is true, but there is no calibrate hook"),
    ):
        with refused(RegistryError, message):
            registry.check(kind)
