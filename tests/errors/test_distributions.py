"""What a package gets wrong, package by package: dist-info folders and modules on `sys.path`.

For each mistake that the design names there is a real distribution which makes it, found by its entry
point; nothing is installed. A good one stands beside it throughout, and works.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packages import OBSERVER, SHIFT, Install
from torch import nn

import inlay
from inlay.errors import RegistryError
from inlay.registry import OBSERVERS
from inlay.testing.refusal import refused

HOOK = """
        @staticmethod
        @hookimpl
        def {signature}:
            return {answer}
"""
SIGNATURES = {
    "inject": "inject(method, sites, adapter)",
    "trainable_mask": "trainable_mask(method, adapter)",
    "merge": "merge(method, adapter)",
    "state_dict": "state_dict(method, adapter)",
    "migrate": "migrate(method, state, from_version)",
    "calibrate": "calibrate(method, model, sites, batches)",
    "prepare": "prepare(method, adapter, call)",
    "auxiliary_loss": "auxiliary_loss(method, adapter)",
    "before_step": "before_step(method, adapter, step)",
    "after_backward": "after_backward(method, adapter, step)",
    "after_step": "after_step(method, adapter, step)",
    "parameter_groups": "parameter_groups(method, adapter, lr)",
    "stages": "stages(method, adapter)",
}
FLAGS = {"calibrate": "calibrates", "prepare": "prepares"}


def shift(hooks: str = "", *, flags: str = "") -> str:
    """Return the code of a package whose method `odd` has these hooks and class attributes besides."""
    code = SHIFT.format(name="odd").replace("import Method,", "import hookimpl, Method,")
    return f"{code}{hooks}{textwrap.indent(flags, ' ' * 8)}\n"


def giving(hook: str, answer: str) -> str:
    """Return the code of a package whose method answers one hook with `answer`."""
    flags = f"\n{FLAGS[hook]} = True" if hook in FLAGS else "\nversion = 2" if hook == "migrate" else ""
    return shift(HOOK.format(signature=SIGNATURES[hook], answer=answer), flags=flags)


@pytest.fixture
def odd(install: Install, base: nn.Module) -> Callable[[str], None]:
    """Return a function that installs odd-pack 2.1, which offers `odd`, beside good-pack."""
    install("good-pack", SHIFT.format(name="good"), good="good_pack:Shift")

    def make(code: str) -> None:
        install("odd-pack", code, version="2.1", odd="odd_pack:Shift")

    return make


def good_still_works() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    inlay.attach(model, "good(targets=['0'])")
    inlay.detach(model)


MISWRITTEN = {
    "misspelt hook": (
        HOOK.format(signature="trainabel_mask(method, adapter)", answer="{}"), "",
        "'trainabel_mask' is not a hook; did you mean 'trainable_mask'",
    ),
    "misspelt beyond recognition": (
        HOOK.format(signature="zzz(method)", answer="1"), "",
        "'zzz' is not a hook; choose among: .*'inject'",
    ),
    "unmarked": (
        "\n        @staticmethod\n        def merge(method, adapter):\n            return {}\n", "",
        "merge is not marked @hookimpl",
    ),
    "takes self": (
        "\n        @hookimpl\n        def merge(self, adapter):\n            return {}\n", "",
        "merge takes 'self', which the hook does not have",
    ),
    "a default": (
        HOOK.format(signature="merge(method, adapter, tolerance=1e-3)", answer="{}"), "",
        r"merge\(tolerance=0.001\) has a default or is keyword-only",
    ),
    "keyword-only": (
        HOOK.format(signature="merge(method, *, adapter)", answer="{}"), "",
        r"merge\(adapter\) has a default or is keyword-only",
    ),
    "no prepare hook": ("", "prepares = True", "prepares is true, but there is no prepare hook"),
    "no calibrate hook": ("", "calibrates = True", "calibrates is true, but there is no calibrate hook"),
    "a calibrate hook that is never asked": (
        HOOK.format(signature=SIGNATURES["calibrate"], answer="{}"), "",
        "its calibrate hook would never be called: calibrates is not true",
    ),
    "a prepare hook that is never asked": (
        HOOK.format(signature=SIGNATURES["prepare"], answer="{}"), "",
        "its prepare hook would never be called: prepares is not true",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("hooks", "flags", "match"), MISWRITTEN.values(), ids=MISWRITTEN)
def test_hooks_that_would_not_be_called_right(
    hooks: str, flags: str, match: str, odd: Callable[[str], None], base: nn.Module
) -> None:
    odd(shift(hooks, flags=f"\n{flags}"))
    said = rf"method 'odd' does not keep the contract[\s\S]*{match}[\s\S]*\(in 'odd' of odd-pack 2\.1\)"
    for _ in range(2):  # nothing is half registered after the first
        with refused(RegistryError, said, model=base):
            inlay.attach(base, "odd(targets=['0'])", data=[torch.ones(1, 3)])
    assert inlay.methods()["odd"].distribution == "odd-pack"  # listing reads metadata alone
    good_still_works()


def test_a_method_without_delta_and_inject(odd: Callable[[str], None], base: nn.Module) -> None:
    """The one hook that `Method` cannot answer by itself."""
    odd(shift().replace("def delta(", "def dleta("))
    match = (
        r"the method 'odd' does not say what its delta is[\s\S]*Shift defines neither delta\(\) nor inject"
    )
    with refused(RegistryError, match, model=base) as caught:
        inlay.attach(base, "odd(targets=['0'])")
    assert caught.error.__notes__ == ["raised by 'odd' of odd-pack 2.1 in its hook 'inject'"]
    good_still_works()


def attach(base: nn.Module, folder: Path) -> None:
    inlay.attach(base, "odd(targets=['0'])", data=[torch.ones(1, 3)])


def attached(base: nn.Module, folder: Path, then: Callable[[], Any]) -> None:
    """Attach, which is fine, and ask for the hook."""
    attach(base, folder)
    with refused(RegistryError, ".*", model=base, folder=folder) as caught:
        then()
    inlay.detach(base)
    raise caught.error


def load_older(base: nn.Module, folder: Path) -> None:
    """Load what version 1 of the method saved."""
    from inlay.testing.folders import edit

    donor = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    attach(donor, folder)
    inlay.save(donor, folder / "saved")
    edit(folder / "saved", lambda manifest: manifest["parts"][0].update(method_version=1))
    inlay.load(base, folder / "saved")


AROUND = ("before_step", "after_backward", "after_step")


def one_step(base: nn.Module) -> None:
    """Take one optimizer step, followed."""
    optimizer = torch.optim.SGD(inlay.parameter_groups(base))
    inlay.lifecycle(base, optimizer)
    base(torch.ones(2, 3)).sum().backward()
    optimizer.step()


ASKS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "inject": attach,
    "trainable_mask": attach,
    "calibrate": attach,
    "migrate": load_older,
    "merge": lambda m, f: attached(m, f, lambda: inlay.merge(m)),
    "state_dict": lambda m, f: attached(m, f, lambda: inlay.save(m, f / "never")),
    "parameter_groups": lambda m, f: attached(m, f, lambda: inlay.parameter_groups(m)),
    "stages": lambda m, f: attached(m, f, lambda: inlay.stages(m, "default")),
    "auxiliary_loss": lambda m, f: attached(m, f, lambda: inlay.auxiliary_loss(m)),
    **{hook: lambda m, f: attached(m, f, lambda: one_step(m)) for hook in AROUND},
    "prepare": lambda m, f: attached(m, f, lambda: m(torch.ones(2, 3))),
}
# An answer of another type, and, where the answer holds things, one that holds the wrong things.
WRONG = {
    "inject": ["None"],
    "trainable_mask": ["None", "['0.value']", "{'0.value': 1}"],
    "merge": ["None", "[]", "{'0': 'fold'}"],
    "state_dict": ["None", "[]", "{'0.value': [0.0]}"],
    "migrate": ["None", "[]", "{'0.value': [0.0]}"],
    "calibrate": ["None", "[]", "{'0': 1.0}"],
    "prepare": ["None", "[]", "{'0': 1.0}"],
    "parameter_groups": ["None", "{}", "[{'params': []}]"],
    "stages": ["None", "{}", "['train']"],
    "auxiliary_loss": ["0.5", "{}"],  # None says that there is no loss
    **dict.fromkeys(AROUND, ()),  # these act, whatever they answer
}


def test_every_hook_of_the_contract_is_asked() -> None:
    from inlay.contract import HOOKS

    assert set(SIGNATURES) == set(ASKS) == set(WRONG) == set(HOOKS)


@pytest.mark.parametrize(("hook", "answer"), [(h, a) for h, answers in WRONG.items() for a in answers])
def test_an_answer_of_the_wrong_type(
    hook: str, answer: str, odd: Callable[[str], None], base: nn.Module, tmp_path: Path
) -> None:
    odd(giving(hook, answer))
    said = "gave no answer" if answer == "None" else "gave an answer of the wrong type"
    match = rf"the hook '{hook}' {said}\n  saw: .* from 'odd' of odd-pack 2\.1\n  do:  return "
    with refused(RegistryError, match, model=base):
        ASKS[hook](base, tmp_path)
    good_still_works()


def test_two_packages_offering_one_observer(install: Install, base: nn.Module) -> None:
    install("acme-note", OBSERVER, group=OBSERVERS, version="0.3", note="acme_note:Note")
    install("zeta-note", OBSERVER, group=OBSERVERS, version="1.2", note="zeta_note:Note")
    with (
        refused(RegistryError, "observer 'note' is offered more than once") as caught,
        inlay.observe("note"),
    ):
        pass
    assert {"acme-note 0.3 (acme_note:Note)", "zeta-note 1.2 (zeta_note:Note)"} == set(
        caught.error.saw.split(" and ")
    )
    assert "uninstall one of them" in caught.error.do


def test_one_package_found_twice_on_the_path_is_one(
    install: Install, monkeypatch: pytest.MonkeyPatch, base: nn.Module
) -> None:
    folder = install("acme-note", OBSERVER, group=OBSERVERS, note="acme_note:Note")
    twice = folder.parent / "again"
    twice.symlink_to(folder)
    monkeypatch.syspath_prepend(twice)
    with inlay.observe("note"):
        inlay.plan(base, "trained(targets=['0'])")
