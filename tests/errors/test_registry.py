"""The registry: packages that are missing, broken or in conflict.

The packages here are real ones: dist-info folders and modules on `sys.path`, without an installation.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from packages import SHIFT, Install
from torch import nn

import inlay
from inlay.authoring import Method
from inlay.errors import InlayError, RegistryError
from inlay.registry import Registry, registry
from inlay.testing.refusal import refused
from inlay_lora import LoRA


@pytest.mark.parametrize("name", ["loar", "gizmo", "__import__", "LoRA", "lora "])
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
    with refused(RegistryError, "did you mean 'lora' or "):
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
    inlay.plan(base, LoRA(rank=2, targets=["0"]))
    with refused(
        RegistryError,
        rf"method 'broken' failed to import[\s\S]*{match}[\s\S]*fix or reinstall broken-pack",
        model=base,
    ):
        inlay.attach(base, "broken")
    with refused(RegistryError, "method 'broken' failed to import", model=base):
        inlay.attach(base, "lora(rank=2, targets=['0']) + broken")
    inlay.attach(base, "lora(rank=2, targets=['0'])")


@pytest.mark.parametrize(
    "value",
    ["wrong_pack:Shift", "wrong_pack:nothing", "wrong_pack:Constant", "wrong_pack"],
    ids=["another id", "a function", "no method", "the module"],
)
def test_an_entry_point_that_names_no_such_method_is_refused(install: Install, value: str) -> None:
    install("wrong-pack", SHIFT.format(name="other") + "\n    def nothing(): ...\n", thing=value)
    with refused(RegistryError, "the entry point 'thing' does not name a method of that id"):
        registry.get("thing")


def test_two_distributions_offering_one_name_are_named(install: Install, base: nn.Module) -> None:
    install("acme-lora", SHIFT.format(name="lora"), version="0.3", lora="acme_lora:Shift")
    match = r"method 'lora' is offered more than once[\s\S]*acme-lora 0\.3[\s\S]*inlay-lora"
    for use in (lambda: registry.get("lora"), lambda: inlay.attach(base, "lora(rank=2, targets=['0'])")):
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
    chosen_ones = {o.distribution for o in chosen.methods().values()}
    assert chosen_ones == {"inlay", "inlay-lora", "inlay-scaling"}
    assert {"dora", "ia3", "ssf", "trained"} <= set(chosen.methods())


def test_plugins_left_out_are_not_found_and_the_error_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAY_LOAD_PLUGINS", "")
    assert sorted(Registry().methods()) == ["dense", "trained"]  # core's own
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


def test_what_a_method_raises_carries_where_it_comes_from(install: Install, base: nn.Module) -> None:
    code = SHIFT.format(name="clumsy").replace("return Constant(site, init)", "raise KeyError('weights')")
    install("clumsy-pack", code, version="3.1", clumsy="clumsy_pack:Shift")
    with pytest.raises(KeyError) as caught:
        inlay.attach(base, "clumsy(targets=['0'])")
    assert caught.value.__notes__ == ["raised by 'clumsy' of clumsy-pack 3.1 in its hook 'inject'"]
    assert not hasattr(base, "_inlay_state")


def test_settings_of_a_class_are_checked_before_its_code_runs(install: Install, base: nn.Module) -> None:
    install("acme-shift", SHIFT.format(name="shift"), shift="acme_shift:Shift")
    with refused(InlayError, "Shift: size is out of range", model=base):
        inlay.attach(base, "shift(size=0)")
