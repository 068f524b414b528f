"""Methods that do not keep the contract: hooks that would not be called right, answers of the wrong type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from packages import Constant, Good, hook, method
from torch import nn, zeros

import inlay
from inlay.authoring import Adapter, Group, InputDelta, Method, Stage, hookimpl
from inlay.errors import InlayError, RegistryError
from inlay.registry import registry
from inlay.testing.refusal import refused


def misspelt() -> dict[str, Any]:
    def trainabel_mask(method, adapter): ...

    return {"trainabel_mask": hook(trainabel_mask)}


def defaulted() -> dict[str, Any]:
    def trainable_mask(method, adapter, all=True): ...

    return {"trainable_mask": hook(trainable_mask)}


def keyword_only() -> dict[str, Any]:
    def trainable_mask(method, *, adapter): ...

    return {"trainable_mask": hook(trainable_mask)}


def unmarked() -> dict[str, Any]:
    def trainable_mask(method, adapter):
        return {}

    return {"trainable_mask": staticmethod(trainable_mask)}


def bound() -> dict[str, Any]:
    def trainable_mask(self, adapter): ...

    return {"trainable_mask": hookimpl(trainable_mask)}


def unknown_parameter() -> dict[str, Any]:
    def trainable_mask(method, adapter, model): ...

    return {"trainable_mask": hook(trainable_mask)}


def renamed() -> dict[str, Any]:
    def fold_all(method, adapter): ...

    return {"fold_all": hook(fold_all, specname="merge")}


MISWRITTEN = {
    "a misspelt hook": (misspelt, r"'trainabel_mask' is not a hook; did you mean 'trainable_mask'"),
    "a default": (defaulted, r"trainable_mask\(all=True\) has a default or is keyword-only"),
    "keyword-only": (keyword_only, r"trainable_mask\(adapter\) has a default or is keyword-only"),
    "no mark": (unmarked, r"trainable_mask is not marked @hookimpl"),
    "a self": (bound, "trainable_mask takes 'self', which the hook does not have"),
    "an unknown parameter": (unknown_parameter, "trainable_mask takes 'model', which the hook does not have"),
    "another name": (renamed, r"'fold_all' is not a hook"),
    "prepares without prepare": (
        lambda: {"prepares": True},
        "prepares is true, but there is no prepare hook",
    ),
    "a hook that is no function": (lambda: {"merge": 5}, "merge is not marked @hookimpl"),
}


def test_a_method_that_keeps_the_contract_is_taken(base: nn.Module) -> None:
    assert inlay.attach(base, method("Fine")).parts[0].parameters == 4


@pytest.mark.parametrize(("attributes", "match"), MISWRITTEN.values(), ids=MISWRITTEN)
def test_a_hook_that_would_not_be_called_right_is_refused(
    attributes: Callable[[], dict[str, Any]], match: str, base: nn.Module
) -> None:
    broken = method("Broken", **attributes())
    with refused(RegistryError, rf"method 'broken' does not keep the contract[\s\S]*{match}", model=base):
        inlay.attach(base, broken)
    with refused(RegistryError, "does not keep the contract"):
        registry.register(type(broken))
    with refused(RegistryError, "does not keep the contract", model=base):  # and again: nothing was kept
        inlay.attach(base, broken)


def test_a_method_without_an_id_is_refused(base: nn.Module) -> None:
    @dataclass(frozen=True)
    class Nameless(Method): ...

    with refused(RegistryError, "the method class Nameless has no id", model=base):
        inlay.attach(base, Nameless(targets=["0"]))
    with refused(RegistryError, "the method class Nameless has no id"):
        registry.register(Nameless)


def test_a_method_without_a_delta_is_refused(base: nn.Module) -> None:
    @dataclass(frozen=True)
    class Empty(Method):
        id: ClassVar[str] = "empty"

    with refused(RegistryError, "the method 'empty' does not say what its delta is", model=base):
        inlay.attach(base, Empty(targets=["0"]))


def answering(name: str, answer: Any) -> dict[str, Any]:
    """Return a hook `name` that gives `answer`."""
    parameters = {"inject": "method, sites, adapter", "parameter_groups": "method, adapter, lr"}.get(
        name, "method, adapter"
    )
    namespace: dict[str, Any] = {"answer": answer}
    exec(f"def {name}({parameters}): return answer", namespace)
    return {name: hook(namespace[name])}


ASKS: dict[str, Callable[[nn.Module], Any]] = {
    "inject": lambda m: inlay.attach(m, _LAST[0], "new"),
    "trainable_mask": lambda m: inlay.attach(m, _LAST[0], "new"),
    "merge": inlay.merge,
    "state_dict": lambda m: inlay.save(m, "never-written"),
    "parameter_groups": inlay.parameter_groups,
    "stages": lambda m: inlay.stages(m, "default"),
    "auxiliary_loss": inlay.auxiliary_loss,
}
_LAST: list[Method] = []

ANSWERS = {
    "inject": [None],
    "trainable_mask": [None, [], "0.value", {"0.value": 1}, {"0.value": "no"}],
    "merge": [None, [], {"0": 5}, {"0": (1, 2)}],
    "state_dict": [None, [], {"0.value": [0.0]}, zeros(3)],
    "parameter_groups": [None, {}, [{"params": []}], ["0.value"]],
    "stages": [None, {}, ["train"], Stage("train")],
    "auxiliary_loss": [0.5, "0", []],
}


@pytest.mark.parametrize(
    ("name", "answer"), [(n, a) for n, answers in ANSWERS.items() for a in answers], ids=lambda v: str(v)[:20]
)
def test_an_answer_of_the_wrong_type_is_refused(
    name: str, answer: Any, base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = method("Odd", **answering(name, answer))
    _LAST[:] = [broken]
    if name not in ("inject", "trainable_mask"):
        inlay.attach(base, broken)
    said = "gave no answer" if answer is None else "gave an answer of the wrong type"
    with refused(RegistryError, rf"the hook '{name}' {said}[\s\S]*'odd' of ", model=base, folder=tmp_path):
        ASKS[name](base)


def test_a_mask_of_other_names_is_refused(base: nn.Module) -> None:
    for mask in ({}, {"0.value": True, "1.value": True}, {"value": True}):
        with refused(
            RegistryError, "the trainable mask of 'odd' does not name the adapter's parameters", model=base
        ):
            inlay.attach(base, method("Odd", **answering("trainable_mask", mask)))


def test_groups_that_miss_a_parameter_are_refused(base: nn.Module) -> None:
    for names in ([], ["0.value", "0.value"], ["0.other"]):
        groups = [Group(names, 1e-3)]
        model = nn.Sequential(nn.Linear(3, 4))
        inlay.attach(model, method("Odd", **answering("parameter_groups", groups)))
        with refused(
            RegistryError,
            "the parameter groups of 'odd' do not cover its trainable parameters once",
            model=model,
        ):
            inlay.parameter_groups(model)


@pytest.mark.parametrize(
    ("fold", "match"),
    [
        (lambda w, b: w, "shape"),
        (lambda w, b: None, "shape"),
        (lambda w, b: (w.T, b), "shape"),
        (lambda w, b: (w, None), "shape"),
        (lambda w, b: (w, b, b), "shape"),
        (lambda w, b: (w, b[:2]), "shape"),
        (lambda w, b: (1, b), "shape"),
    ],
)
def test_a_fold_of_another_shape_is_refused(fold: Any, match: str, base: nn.Module) -> None:
    class Odd(Good):
        id: ClassVar[str] = "odd"

        @staticmethod
        @hookimpl
        def merge(method: Any, adapter: Adapter) -> Any:
            return dict.fromkeys(adapter.sites, fold)

    inlay.attach(base, dataclass(frozen=True)(Odd)())
    with refused(
        RegistryError,
        rf"the fold of 'odd' does not give a weight and bias of the layer's {match}",
        model=base,
    ):
        inlay.merge(base)


def test_a_site_without_a_fold_is_refused(base: nn.Module) -> None:
    inlay.attach(base, method("Odd", **answering("merge", {})))
    with refused(RegistryError, r"the fold of 'odd'[\s\S]*at 0: no fold", model=base):
        inlay.merge(base)


def test_inlays_own_errors_carry_it_too(base: nn.Module) -> None:
    class Sideways(InputDelta): ...

    kind = method("Odd", delta=lambda self, site, init: Sideways())
    conv = nn.Sequential(nn.Embedding(3, 4))
    object.__setattr__(kind, "targets", ("0",))
    type(kind).accepts = frozenset({"embedding"})  # type: ignore[misc]
    with refused(
        InlayError, "a embedding site cannot carry a delta with the input face", model=conv
    ) as caught:
        inlay.attach(conv, kind)
    assert "in its hook 'inject'" in caught.error.__notes__[0]


def test_deltas_where_the_method_was_not_sent_are_refused(base: nn.Module) -> None:
    class Wanders(Good):
        id: ClassVar[str] = "wanders"

        @staticmethod
        @hookimpl
        def inject(method: Any, sites: Any, adapter: Adapter) -> int:
            from inlay.anatomy import Anatomy

            other = Anatomy(adapter.model).leaf("1", adapter.model[1])  # type: ignore[index]
            assert other is not None
            adapter.place(other, Constant(other, adapter.init(other)))
            return 1

    with refused(InlayError, "a delta was placed on a site the method was not given", model=base):
        inlay.attach(base, dataclass(frozen=True)(Wanders)())


def test_a_method_that_places_nothing_is_refused(base: nn.Module) -> None:
    with refused(InlayError, "'odd' placed nothing", model=base):
        inlay.attach(base, method("Odd", **answering("inject", 0)))
