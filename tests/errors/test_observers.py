"""Observers: what may wrap hooks, by name, by object, and from the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from packages import OBSERVER, Install, method
from torch import nn

import inlay
from inlay.authoring import Adapter, hookimpl
from inlay.errors import RegistryError
from inlay.registry import OBSERVERS, Registry
from inlay.testing.refusal import refused


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
    with (
        refused(RegistryError, r"no installed package offers the observer 'noet'[\s\S]*observers here: note"),
        inlay.observe("noet"),
    ):
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
        inlay.attach(model, "lora(rank=2, targets=['0'])")
        print(sys.modules["acme_note"].Note.seen)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(folder), "INLAY_TRACE": "1", "INLAY_OBSERVERS": "note"},
    )
    assert done.stdout == "['lora']\n"
    assert "inlay: inject('lora')" in done.stderr
    assert "inlay: trainable_mask('lora')" in done.stderr


class Names:
    """An observer that notes which adapter each hook is about, and whether a file fills it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bool]] = []

    @hookimpl(wrapper=True)
    def inject(self, adapter: Any) -> Any:
        self.seen.append(("inject", adapter.path, adapter.filled))
        return (yield)

    @hookimpl(wrapper=True)
    def merge(self, adapter: Any) -> Any:
        self.seen.append(("merge", adapter.path, adapter.filled))
        return (yield)


def test_an_observer_knows_the_adapter_and_a_dry_run_has_none(base: nn.Module, tmp_path: Path) -> None:
    observer = Names()
    with inlay.observe(observer):
        inlay.plan(base, "lora(rank=2, targets=['0'])")
        inlay.attach(base, "lora(rank=2, targets=['0'])", name="fr")
        inlay.save(base, tmp_path / "saved")
        inlay.merge(base, undo=False)
        inlay.load(base, tmp_path / "saved", name="de")
    assert observer.seen == [
        ("inject", "", False), ("inject", "fr/lora", False), ("merge", "fr/lora", False),
        ("inject", "", False), ("inject", "de/lora", True),
    ]  # fmt: skip


def test_a_summary_only_asks_what_could_merge_and_is_not_observed(base: nn.Module) -> None:
    observer = Names()
    inlay.attach(base, "lora(rank=2, targets=['0'])")
    with inlay.observe(observer):
        assert inlay.summary(base).parts[0].mergeable
    assert observer.seen == []
