"""The registry: packages that are missing, broken, in conflict, or do not keep the contract.

The packages here are real ones: dist-info folders and modules on `sys.path`, without an installation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import inlay
import pytest
from inlay.authoring import Adapter, Group, InputDelta, Method, OutputDelta, Stage, hookimpl
from inlay.errors import InlayError, RegistryError
from inlay.registry import GROUP, OBSERVERS, Registry, registry
from inlay.testing.refusal import refused
from inlay_lora import LoRA
from torch import Tensor, nn, zeros

Install = Callable[..., Path]

SHIFT = """
    from dataclasses import dataclass
    from typing import ClassVar
    from inlay.authoring import Method, OutputDelta, setting

    class Constant(OutputDelta):
        def __init__(self, site, init):
            super().__init__()
            self.value = init.zeros(site.out_features)

        def forward(self, x, y, at):
            return self.value

    @dataclass(frozen=True)
    class Shift(Method):
        id: ClassVar[str] = {name!r}
        size: int = setting(1, least=1)

        def delta(self, site, init):
            return Constant(site, init)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that puts a distribution with entry points and one module on sys.path."""
    made: list[str] = []

    def install(
        distribution: str, code: str, *, group: str = GROUP, version: str = "1.0", **entries: str
    ) -> Path:
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
        module = distribution.replace("-", "_")
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
        made.append(module)
        monkeypatch.syspath_prepend(folder)
        return folder

    yield install
    for module in made:
        sys.modules.pop(module, None)


@pytest.fixture
def base() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))


# -- missing, broken, in conflict ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["loar", "vera", "__import__", "LoRA", "lora "])
def test_an_unknown_method_names_packages(name: str) -> None:
    with refused(
        RegistryError, rf"no installed package offers the method '{name}'[\s\S]*pip install .*inlay-\*"
    ) as caught:
        registry.get(name)
    assert "lora" in caught.error.saw
    with refused(RegistryError, "no installed package offers"):
        registry.build(name, {})


@pytest.mark.parametrize("name", [5, None, ("a",), b"lora", "x" * 100_000])
def test_what_is_no_name_is_refused(name: Any) -> None:
    with refused(RegistryError, "no installed package offers the method"):
        registry.get(name)


def test_a_near_name_is_offered() -> None:
    with refused(RegistryError, "did you mean 'lora' or 'dora'"):
        registry.get("loar")


def test_a_package_that_is_found_works(install: Install, base: nn.Module, tmp_path: Path) -> None:
    """The control of the tests below: the same packages, with nothing wrong."""
    install("acme-shift", SHIFT.format(name="shift"), version="2.5", shift="acme_shift:Shift")
    assert inlay.methods()["shift"].distribution == "acme-shift"
    assert "acme_shift" not in sys.modules  # names are read from metadata; nothing was imported
    inlay.attach(base, "shift(size=2, targets=['0'])")
    inlay.save(base, tmp_path / "saved")
    part = json.loads((tmp_path / "saved" / "inlay.json").read_text())["parts"][0]
    assert (part["distribution"], part["version"]) == ("acme-shift", "2.5")


@pytest.mark.parametrize(
    ("code", "match"),
    [
        ("raise RuntimeError('no driver found')", "RuntimeError: no driver found in broken-pack 1.0"),
        (
            "import a_module_that_is_not_there",
            "ModuleNotFoundError: .*a_module_that_is_not_there.* in broken-pack 1.0",
        ),
        ("x = = 1", "SyntaxError: .* in broken-pack 1.0"),
        ("import sys; sys.exit(3)", "SystemExit: 3 in broken-pack 1.0"),
        ("Nothing = 1", "AttributeError: .*Shift.* in broken-pack 1.0"),
    ],
    ids=["raises", "imports what is missing", "syntax", "exits", "lacks the class"],
)
def test_a_plugin_that_fails_to_import_hurts_only_itself(
    install: Install, base: nn.Module, code: str, match: str
) -> None:
    install("broken-pack", code, broken="broken_pack:Shift")
    assert "broken" in inlay.methods()
    assert registry.get("lora") is LoRA
    inlay.plan(base, LoRA(targets=["0"]))
    with refused(
        RegistryError,
        rf"method 'broken' failed to import[\s\S]*{match}[\s\S]*fix or reinstall broken-pack",
        model=base,
    ):
        inlay.attach(base, "broken")
    with refused(RegistryError, "method 'broken' failed to import", model=base):
        inlay.attach(base, "lora(targets=['0']) + broken")
    inlay.attach(base, "lora(targets=['0'])")


@pytest.mark.parametrize(
    "value", ["wrong_pack:Shift", "wrong_pack:nothing", "wrong_pack:Constant", "wrong_pack"],
    ids=["another id", "a function", "no method", "the module"],
)  # fmt: skip
def test_an_entry_point_that_names_no_such_method_is_refused(install: Install, value: str) -> None:
    install("wrong-pack", SHIFT.format(name="other") + "\n    def nothing(): ...\n", thing=value)
    with refused(RegistryError, "the entry point 'thing' does not name a method of that id"):
        registry.get("thing")


def test_two_distributions_offering_one_name_are_named(install: Install, base: nn.Module) -> None:
    install("acme-lora", SHIFT.format(name="lora"), version="0.3", lora="acme_lora:Shift")
    match = r"method 'lora' is offered more than once[\s\S]*acme-lora 0\.3[\s\S]*inlay-lora"
    for use in (lambda: registry.get("lora"), lambda: inlay.attach(base, "lora(targets=['0'])")):
        with refused(RegistryError, match, model=base) as caught:
            use()
        assert "uninstall one" in caught.error.do
    assert "acme_lora" not in sys.modules
    inlay.attach(base, "ia3(targets=['0'])")  # other names are unaffected


def test_one_of_two_can_be_chosen(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme-lora", SHIFT.format(name="lora"), version="0.3", lora="acme_lora:Shift")
    monkeypatch.setenv("INLAY_LOAD_PLUGINS", "acme-lora")
    assert Registry().get("lora").__module__ == "acme_lora"
    monkeypatch.setenv("INLAY_LOAD_PLUGINS", " Inlay_LoRA , inlay.scaling")
    chosen = Registry()
    assert chosen.get("lora") is LoRA
    assert sorted(chosen.methods()) == ["dora", "ia3", "lora", "ssf", "trained"]


def test_plugins_left_out_are_not_found_and_the_error_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAY_LOAD_PLUGINS", "")
    assert sorted(Registry().methods()) == ["trained"]  # core's own
    with refused(
        RegistryError,
        r"no installed package offers the method 'lora'[\s\S]*INLAY_LOAD_PLUGINS='' hides others",
    ):
        Registry().get("lora")


def test_a_local_class_cannot_hide_an_installed_one() -> None:
    @dataclass(frozen=True)
    class Impostor(Method):
        id: ClassVar[str] = "lora"

    with refused(RegistryError, r"an installed package already offers a method 'lora'[\s\S]*inlay-lora"):
        registry.register(Impostor)
    assert registry.get("lora") is LoRA
    registry.register(LoRA)  # itself is fine
    registry.forget(LoRA)


# -- methods that do not keep the contract -------------------------------------------------------


class Constant(OutputDelta):
    def __init__(self, site: Any, init: Any) -> None:
        super().__init__()
        self.value = init.zeros(site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return self.value


class Good(Method):
    """A method as it should be; the classes below each break one thing of it."""

    id: ClassVar[str] = "good"
    default_targets: ClassVar[tuple[str, ...]] = ("0",)

    def delta(self, site: Any, init: Any) -> Any:
        return Constant(site, init)


def method(name: str, **attributes: Any) -> Method:
    """Return an instance of a fresh subclass of Good with the given attributes."""
    kind = dataclass(frozen=True)(
        type(name, (Good,), {"id": name.lower(), "__module__": __name__, **attributes})
    )
    return kind()


def hook(function: Callable[..., Any], **options: Any) -> staticmethod[..., Any]:
    return staticmethod(hookimpl(function, **options) if options else hookimpl(function))


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
    "prepares without prepare": (lambda: {"prepares": True}, "prepares is true, but there is no prepare hook"),
    "a hook that is no function": (lambda: {"merge": 5}, "merge is not marked @hookimpl"),
}  # fmt: skip


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
        (lambda w, b: w, "shape"), (lambda w, b: None, "shape"), (lambda w, b: (w.T, b), "shape"), (lambda w, b: (w, None), "shape"),
        (lambda w, b: (w, b, b), "shape"), (lambda w, b: (w, b[:2]), "shape"), (lambda w, b: (1, b), "shape"),
    ],
)  # fmt: skip
def test_a_fold_of_another_shape_is_refused(fold: Any, match: str, base: nn.Module) -> None:
    class Odd(Good):
        id: ClassVar[str] = "odd"

        @staticmethod
        @hookimpl
        def merge(method: Any, adapter: Adapter) -> Any:
            return {site: fold for site in adapter.sites}

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


def test_what_a_method_raises_carries_where_it_comes_from(install: Install, base: nn.Module) -> None:
    code = SHIFT.format(name="clumsy").replace("return Constant(site, init)", "raise KeyError('weights')")
    install("clumsy-pack", code, version="3.1", clumsy="clumsy_pack:Shift")
    with pytest.raises(KeyError) as caught:
        inlay.attach(base, "clumsy(targets=['0'])")
    assert caught.value.__notes__ == ["raised by 'clumsy' of clumsy-pack 3.1 in its hook 'inject'"]
    assert not hasattr(base, "_inlay_state")


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


# -- observers -----------------------------------------------------------------------------------


class Counter:
    """An observer that notes which hooks it saw around."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @hookimpl(wrapper=True)
    def inject(self, method: Any, sites: Any, adapter: Any) -> Any:
        self.seen.append("before inject")
        answer = yield
        self.seen.append("after inject")
        return answer


OBSERVER = """
    from inlay.authoring import hookimpl

    class Note:
        seen = []

        @hookimpl(wrapper=True)
        def inject(self, method, sites, adapter):
            Note.seen.append(method.id)
            return (yield)
"""


def test_an_observer_wraps_hooks_for_a_while(base: nn.Module) -> None:
    observer = Counter()
    with inlay.observe(observer):
        inlay.plan(base, method("Fine"))
    inlay.plan(base, method("Fine"))
    assert observer.seen == ["before inject", "after inject"]


def test_an_installed_observer_is_found_by_name(install: Install, base: nn.Module) -> None:
    install("acme-note", OBSERVER, group=OBSERVERS, note="acme_note:Note")
    with inlay.observe("note"):
        inlay.plan(base, method("Fine"))
    assert sys.modules["acme_note"].Note.seen == ["fine"]


class Answers:
    @hookimpl
    def inject(self, method: Any, sites: Any, adapter: Any) -> Any:
        return 1


class Misspells:
    @hookimpl(wrapper=True)
    def injekt(self, method: Any) -> Any:
        return (yield)


class WrapsNothing: ...


@pytest.mark.parametrize(
    ("observer", "match"),
    [
        (Answers(), "inject does not wrap: write @hookimpl"),
        (Misspells(), "'injekt' is not a hook"),
        (WrapsNothing(), "it wraps no hook"),
    ],
)
def test_what_cannot_observe_is_refused(observer: Any, match: str, base: nn.Module) -> None:
    watching = Counter()
    with (
        refused(RegistryError, rf"this cannot observe hooks[\s\S]*{match}"),
        inlay.observe(watching, observer),
    ):
        pass
    inlay.plan(base, method("Fine"))
    assert watching.seen == []  # the one before it was not left behind
    with inlay.observe(watching), refused(RegistryError, "it observes already"), inlay.observe(watching):
        pass


def test_an_unknown_observer_is_refused(install: Install) -> None:
    install("acme-note", OBSERVER, group=OBSERVERS, note="acme_note:Note")
    with refused(
        RegistryError, r"no installed package offers the observer 'noet'[\s\S]*observers here: note"
    ):
        with inlay.observe("noet"):
            pass


def test_an_observer_that_fails_to_import_is_named(install: Install) -> None:
    install("acme-note", "1 / 0", group=OBSERVERS, version="0.9", note="acme_note:Note")
    match = (
        r"the observer 'note' failed to import[\s\S]*ZeroDivisionError: division by zero in acme-note 0\.9"
    )
    with refused(RegistryError, match), inlay.observe("note"):
        pass


def test_observers_in_the_environment_wrap_from_the_start(
    install: Install, base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme-note", OBSERVER, group=OBSERVERS, note="acme_note:Note")
    monkeypatch.setenv("INLAY_OBSERVERS", " note , note")
    fresh, fine = Registry(), method("Fine")
    adapter = Adapter((), model=base)
    for _ in range(2):
        fresh.call("inject", fine, sites=(), adapter=adapter)
    assert sys.modules["acme_note"].Note.seen == ["fine", "fine"]


def test_an_observer_missing_from_the_environment_stops_the_first_hook(
    monkeypatch: pytest.MonkeyPatch, base: nn.Module
) -> None:
    """A policy that cannot be loaded must not be skipped, neither now nor at the next call."""
    monkeypatch.setenv("INLAY_OBSERVERS", "policy")
    fresh = Registry()
    for _ in range(2):
        with refused(RegistryError, "no installed package offers the observer 'policy'"):
            fresh.call("inject", method("Fine"), sites=(), adapter=Adapter((), model=base))


def test_trace_and_observers_in_a_real_process(install: Install, tmp_path: Path) -> None:
    folder = install("acme-note", OBSERVER, group=OBSERVERS, note="acme_note:Note")
    code = """
        import sys, torch, inlay
        model = torch.nn.Sequential(torch.nn.Linear(3, 4))
        inlay.attach(model, "lora(targets=['0'])")
        print(sys.modules["acme_note"].Note.seen)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(folder), "INLAY_TRACE": "1", "INLAY_OBSERVERS": "note"},
    )  # fmt: skip
    assert done.stdout == "['lora']\n"
    assert "inlay: inject('lora')" in done.stderr
    assert "inlay: trainable_mask('lora')" in done.stderr


def test_settings_of_a_class_are_checked_before_its_code_runs(install: Install, base: nn.Module) -> None:
    install("acme-shift", SHIFT.format(name="shift"), shift="acme_shift:Shift")
    with refused(InlayError, "Shift: size is out of range", model=base):
        inlay.attach(base, "shift(size=0)")
