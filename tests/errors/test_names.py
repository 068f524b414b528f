"""Names of adapters and parts: what cannot be one, what is taken, what is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.errors import ConfigError, StateError
from inlay.stack import MAX_NAME, Stack, need_state
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay_lora import LoRA
from inlay_scaling import IA3

BAD = {
    "empty": "",
    "a slash": "fr/lora",
    "only a slash": "/",
    "a newline": "fr\n",
    "a carriage return": "f\rr",
    "an escape": "\x1b[31mfr",
    "a null": "fr\0",
    "a C1 control": "fr\x9b",
    "turned around": "fr\u202e",
    "no width": "f\u200br",
    "half a character": "fr\ud800",
    "a line separator": "fr\u2028",
    "too long": "x" * (MAX_NAME + 1),
    "a number": 5,
    "nothing": None,
    "bytes": b"fr",
    "a list": ["fr"],
}
GOOD = [
    "fr",
    "größe",
    "日本",
    "a b",
    "..",
    ".",
    "0",
    "inlay.json",
    "[bold]",
    "'",
    '"',
    "x" * MAX_NAME,
    "a:b",
    "*",
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("llama")


@pytest.fixture(scope="module")
def adapted() -> nn.Module:
    model = build("llama")
    inlay.attach(model, LoRA(rank=2) + IA3(), "fr")
    inlay.attach(model, LoRA(rank=2), "de")
    return model


@pytest.fixture(scope="module")
def saved(adapted: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "fr"
    inlay.save(adapted, folder, "fr")
    return folder


@pytest.mark.parametrize("name", BAD.values(), ids=BAD)
def test_what_cannot_name_an_adapter_is_refused(
    name: Any, model: nn.Module, adapted: nn.Module, saved: Path
) -> None:
    match = "this cannot be the name of an adapter"
    with refused(ConfigError, match, model=model):
        inlay.attach(model, LoRA(), name)
    with refused(ConfigError, match, model=model, folder=saved):
        inlay.load(model, saved, name)
    with refused(ConfigError, match, model=adapted):
        inlay.combine(adapted, {"de": 1.0}, name=name)


@pytest.mark.parametrize("name", BAD.values(), ids=BAD)
def test_what_cannot_name_a_part_is_refused(name: Any) -> None:
    with refused(ConfigError, "this cannot be the name of a part"):
        LoRA().named(name)


@pytest.mark.parametrize("name", ["", "a/b", "\x1b", "\u202e", 5, None, ("a",)])
def test_what_cannot_name_a_part_is_refused_in_text(name: Any, model: nn.Module) -> None:
    with refused(ConfigError, "this cannot be the name of a part", model=model):
        inlay.attach(model, f"lora().named({name!r})")


@pytest.mark.parametrize("name", GOOD)
def test_printable_names_work_everywhere(name: str, tmp_path: Path) -> None:
    model, fresh = build("llama"), build("llama")
    inlay.attach(model, LoRA(rank=1).named(name) + IA3(), name)
    inlay.save(model, tmp_path, name)
    inlay.load(fresh, tmp_path, name)
    batch = batch_for(model)
    with torch.no_grad(), inlay.route(fresh, [name, None, f"{name}/{name}"]):
        fresh(**batch)
    assert [p.path for p in need_state(fresh).placed.values()] == [f"{name}/{name}", f"{name}/ia3"]
    inlay.detach(fresh, f"{name}/{name}")
    assert [p.path for p in need_state(fresh).placed.values()] == [f"{name}/ia3"]


def test_a_taken_name_is_refused(adapted: nn.Module, saved: Path) -> None:
    match = r"an adapter called 'fr' is already attached[\s\S]*attached: 'fr', 'de'"
    with refused(ConfigError, match, model=adapted):
        inlay.attach(adapted, LoRA(), "fr")
    with refused(ConfigError, match, model=adapted, folder=saved):
        inlay.load(adapted, saved, "fr")
    with refused(ConfigError, match, model=adapted):
        inlay.combine(adapted, {"de": 1.0}, name="fr")


@pytest.mark.parametrize(
    "stack",
    [
        lambda: LoRA() + LoRA(),
        lambda: LoRA().named("a") + IA3().named("a"),
        lambda: Stack.of("lora + ia3 + lora(rank=2)"),
    ],
)
def test_two_parts_of_one_name_are_refused(stack: Callable[[], Any], model: nn.Module) -> None:
    with refused(ConfigError, "two parts of a stack have the same name", model=model):
        inlay.attach(model, stack())


def test_train_beside_a_part_of_that_name_is_refused(model: nn.Module) -> None:
    with refused(ConfigError, "two parts of a stack have the same name", model=model):
        inlay.attach(model, LoRA().named("trained"), train=("head",))


@pytest.mark.parametrize("name", ["it", "fr/lara", "fr/", "lora", "", "FR", 5, None])
def test_a_name_that_is_not_there_is_refused(name: Any, adapted: nn.Module, tmp_path: Path) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: inlay.use(adapted, name),
        lambda: inlay.use(adapted, "fr", name),
        lambda: inlay.route(adapted, ["fr", ("de", name)]),
        lambda: inlay.merge(adapted, [name]),
        lambda: inlay.set_trainable(adapted, "fr", name),
        lambda: inlay.stages(adapted, name),
        lambda: inlay.advance(adapted, name),
        lambda: inlay.combine(adapted, {"de": 0.5, name: 0.5}, name="mix"),
    ]
    if name is not None:  # None means all of them there
        uses += [lambda: inlay.detach(adapted, name), lambda: inlay.save(adapted, tmp_path / "new", name)]
    for use in uses:
        with refused(StateError, "no adapter is called", model=adapted, folder=tmp_path) as caught:
            use()
    near = {"fr/lara": "did you mean 'fr/lora'", "FR": "choose among: 'de', 'de/lora', 'fr'"}
    assert near.get(name, "") in caught.error.do


def test_where_one_part_is_meant_a_stack_is_refused(adapted: nn.Module) -> None:
    with refused(StateError, r"'fr' has several parts[\s\S]*fr/lora.*fr/ia3"):
        need_state(adapted).adapter_of("fr")
    assert need_state(adapted).adapter_of("fr/ia3").sites


@pytest.mark.parametrize("thing", [None, "fr", nn.Linear(2, 2)])
def test_a_model_without_adapters_is_refused(thing: Any, tmp_path: Path) -> None:
    for use in (
        inlay.detach,
        inlay.use,
        inlay.unmerge,
        inlay.merge,
        inlay.set_trainable,
        inlay.parameter_groups,
        inlay.auxiliary_loss,
        inlay.check_training,
        lambda m: inlay.route(m, ["fr"]),
        lambda m: inlay.save(m, tmp_path / "new"),
        lambda m: inlay.advance(m, "fr"),
        lambda m: inlay.stages(m, "fr"),
    ):
        with refused(StateError, "nothing is attached to this model", folder=tmp_path):
            use(thing)
