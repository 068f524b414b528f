"""`MethodConformance`: what a method subclasses to be held to every rule, in about ten lines."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.method import Method
from inlay.testing import profiles
from inlay.testing.cases import FAMILIES, NAME, Case, Joined, cases
from inlay.testing.neighbours import NEIGHBOURS
from inlay.testing.profiles import profile
from inlay.testing.rule import Rule
from inlay.testing.rules import RULES

EXCUSED = 20  # times the examples, to find one that an excuse is for


class MethodConformance:
    """Subclass as `class TestX(MethodConformance)`; every rule becomes a test of its own.

    `method` and `configurations` (a strategy of configured methods) must be given, and
    `parameters(method, sites)`, the documented count. The rest says what the method can do; see
    `Joined`. `excused` maps a rule's number to the reason why it cannot be kept; an excuse that
    is no longer needed fails.
    """

    method: ClassVar[type[Method]]
    configurations: ClassVar[st.SearchStrategy[Any]]
    families: ClassVar[tuple[str, ...]] = FAMILIES
    targets: ClassVar[tuple[tuple[str, ...] | None, ...]] = (None,)
    by_layer: ClassVar[bool] = True
    start_tolerance: ClassVar[float] = 0.0
    merges: ClassVar[Any] = False
    adds_biases: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    quantised: ClassVar[bool] = True
    golden: ClassVar[Path | None] = None
    excused: ClassVar[dict[str, str]] = {}

    @staticmethod
    def parameters(method: Any, sites: Sequence[Any]) -> int:
        raise NotImplementedError("give the documented parameter count: parameters(method, sites)")

    @classmethod
    def joined(cls) -> Joined:
        """Return what the class declares, as data."""
        fields = {f.name for f in dataclasses.fields(Joined)} - {"kind", "name", "golden"}
        declared = {name: getattr(cls, name) for name in fields}
        return Joined(kind=cls.method, name=cls.__name__, golden=cls.golden or _beside(cls), **declared)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = [name for name in vars(cls) if name.startswith("test_R")]
        if own:
            raise TypeError(f"{cls.__name__} overrides {own[0]}; use excused = {{'R..': 'reason'}} instead")
        unknown = sorted(cls.excused.keys() - RULES.keys())
        if unknown:
            raise TypeError(f"{cls.__name__} excuses {unknown[0]!r}, which is no rule")
        joined, further = cls.joined(), _further(cls)
        for rule in RULES.values():
            name = f"test_{rule.number}_{rule.check.__name__}"
            if rule.covers(joined) and not (rule.costly and further):
                setattr(cls, name, test_of(rule, joined, cls.excused, share=0.5 if further else 1.0))
            elif hasattr(cls, name):
                setattr(cls, name, None)  # not the one of the class it derives from


def _beside(cls: type) -> Path | None:
    """Return the folder "golden" beside the file a class is written in."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return Path(file).parent / "golden" if file else None


def _further(cls: type[MethodConformance]) -> bool:
    """Whether a class is a further configuration of a method that one it derives from declares."""
    declared = [base for base in cls.__mro__[1:] if getattr(base, "method", None) is cls.method]
    return bool(declared) and profiles.NAME != "long"


def test_of(rule: Rule, joined: Joined, excused: dict[str, str], *, share: float) -> Callable[..., None]:
    """Return the test of one rule for one method: a property over cases, or a single check."""
    reason = excused.get(rule.number)
    looks = rule.share * share * (1 if reason is None else EXCUSED)
    if rule.once:

        def test(self: Any) -> None:
            rule(joined)
    else:

        @profile(looks)
        @given(case=st.deferred(lambda: drawn(rule, joined)))
        def test(self: Any, case: Case) -> None:  # type: ignore[misc]
            rule(case)

    return test if reason is None else pytest.mark.xfail(strict=True, reason=reason)(test)


def drawn(rule: Rule, joined: Joined) -> st.SearchStrategy[Case]:
    """Return the cases a rule is checked on for one method: by itself, and among the kit's neighbours."""
    others = () if rule.alone else NEIGHBOURS
    found = cases(joined, others=others, dtypes=rule.dtypes, families=rule.among(joined.families))
    if rule.concerns == "any":
        return found
    merging = rule.concerns == "merging"
    return found.filter(lambda case: (f"{NAME}/subject" in case.merging()) is merging)


def collect(files: Iterable[Path]) -> list[Joined]:
    """Return what the `MethodConformance` classes in these test files declare."""
    found: dict[str, Joined] = {}
    for number, file in enumerate(sorted(files)):
        spec = importlib.util.spec_from_file_location(f"inlay_conformance_{number}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, MethodConformance)
                and value is not MethodConformance
            ):
                found[f"{file}:{value.__name__}"] = value.joined()
    return list(found.values())
