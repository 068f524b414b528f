"""What rules are checked on: a tiny model and a stack of configured methods, drawn by Hypothesis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import inlay
from inlay.anatomy import Anatomy
from inlay.method import Method
from inlay.sites import Site
from inlay.stack import Part, Stack
from inlay.targets import SIDED, resolve
from inlay.testing.models import batch_for, build
from inlay.testing.rule import Rule

NAME = "fr"
FAMILIES = ("llama", "gpt2", "bert", "t5", "vit")
Count = Callable[[Any, Sequence[Site]], int]


@dataclass(frozen=True, eq=False)
class Joined:
    """What a method declares when it joins the kit: how to configure it, and what it can do.

    `targets` are the selections to try (None: the method's default), `by_layer` whether it can be
    limited to layers, `start_tolerance` how far rounding moves the output at the start (relative;
    0: not a bit), `merges` whether it has a weight form, everywhere or as a function of
    (method, family), `adds_biases` whether merging gives a bias to layers without one, `replaces`
    whether it puts values in the base's place (and so hides what acts below), `parameters` the number
    of its parameters on given sites, `quantised` whether it acts on a base in few bits, `golden` where
    the files lie that its format is compared with, `name` that of the class that declares it.
    """

    kind: type[Method]
    configurations: st.SearchStrategy[Any]
    families: tuple[str, ...] = FAMILIES
    targets: tuple[tuple[str, ...] | None, ...] = (None,)
    by_layer: bool = True
    start_tolerance: float = 0.0
    merges: bool | Callable[[Any, str], bool] = False
    adds_biases: bool = False
    replaces: bool = False
    parameters: Count | None = None
    quantised: bool = True
    golden: Path | None = None
    name: str = ""

    def merges_as(self, method: Method, family: str) -> bool:
        return self.merges if isinstance(self.merges, bool) else self.merges(method, family)

    def __repr__(self) -> str:
        return f"Joined({self.kind.__name__})"


@dataclass(frozen=True, eq=False)
class Member:
    """A configured method under a name of its own in a stack."""

    name: str
    method: Method
    joined: Joined

    def __repr__(self) -> str:
        return f"{self.method!r}.named({self.name!r})"


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny model of a family and dtype, and a stack (first member innermost)."""

    family: str
    dtype: torch.dtype
    members: tuple[Member, ...]
    seed: int = 0

    def model(self) -> nn.Module:
        """Return a fresh model, always the same, that has run once (some modules note things then)."""
        model = tiny(self.family, seed=self.seed, dtype=self.dtype)
        with torch.no_grad():
            model(**batch_for(model, rows=1, labels=True))
        return model

    @property
    def stack(self) -> Stack:
        return Stack(tuple(Part(m.name, m.method) for m in self.members))

    def attach(self, model: nn.Module, name: str = NAME, *, seed: int | None = None, **options: Any) -> Any:
        if any(m.method.calibrates for m in self.members):
            options["data"] = [batch_for(model, seed=n, labels=True) for n in range(2)]
        return inlay.attach(model, self.stack, name, seed=self.seed if seed is None else seed, **options)

    def attached(self) -> nn.Module:
        """Return a fresh model with the stack attached as "fr"."""
        model = self.model()
        self.attach(model)
        return model

    def merging(self) -> list[str]:
        """Return the paths of the parts that have a weight form here, in stack order."""
        return [f"{NAME}/{m.name}" for m in self.members if m.joined.merges_as(m.method, self.family)]

    def lasting(self) -> list[str]:
        """Return the paths of the parts that have none."""
        return [p for m in self.members if (p := f"{NAME}/{m.name}") not in self.merging()]

    def __repr__(self) -> str:
        stack = " + ".join(map(repr, self.members))
        return f"Case({self.family}, {str(self.dtype).removeprefix('torch.')}, seed={self.seed}: {stack})"


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a seeded tiny model whose layers act: at the usual initialisation (0.02) they hardly do."""
    return build(family, seed=seed, dtype=dtype, **lively_settings(family))


def lively_settings(family: str) -> dict[str, float]:
    """Return the configuration that makes a family's layers act; T5 draws its weights at 1/√d already."""
    return {} if family == "t5" else {"initializer_range": 0.2}


def members(joined: Joined, name: str, family: str) -> st.SearchStrategy[Member]:
    """Draw a configuration, targets and layers of a method; with two sides, both are meant."""

    def placed(method: Method, targets: tuple[str, ...] | None, layers: Any) -> Member:
        if family == "t5" and targets is not None:
            targets = tuple(f"both.{role}" if role in SIDED else role for role in targets)
        changes: dict[str, Any] = {
            k: v for k, v in (("targets", targets), ("layers", layers)) if v is not None
        }
        return Member(name, dataclasses.replace(method, **changes), joined)

    layers = st.sampled_from([None, None, (1,), "0-1"]) if joined.by_layer else st.none()
    return st.builds(placed, joined.configurations, st.sampled_from(joined.targets), layers)


def visible(family: str, stack: tuple[Member, ...]) -> tuple[Member, ...]:
    """Return the stack without neighbours that would hide, or be hidden by, another member at some site."""
    kept: list[Member] = []
    for member in stack:
        hidden = member.joined.replaces and any(_places(family, member) & _places(family, m) for m in kept)
        if hidden and member.name == "subject":
            kept = []
        if not hidden or member.name == "subject":
            kept.append(member)
    return tuple(kept)


def _places(family: str, member: Member) -> set[str]:
    return {site.name.split("[")[0] for site in resolve(_anatomy(family), member.method)}


@cache
def _anatomy(family: str) -> Anatomy:
    return Anatomy(tiny(family))


@st.composite
def cases(
    draw: st.DrawFn,
    joined: Joined,
    *,
    others: Sequence[Joined] = (),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    families: Sequence[str] = (),
) -> Case:
    """Draw a stack of one method with at most one of `others` below and one above it.

    `families` are those to draw from (none given: the method's own).
    """
    family = draw(st.sampled_from(tuple(families) or joined.families))
    beside = [o for o in others if family in o.families]
    around = st.sampled_from([None, *beside])
    chosen = [(draw(around), "below"), (joined, "subject"), (draw(around), "above")]
    stack = visible(family, tuple(draw(members(j, name, family)) for j, name in chosen if j is not None))
    dtype = getattr(torch, draw(st.sampled_from(tuple(dtypes))))
    return Case(family, dtype, stack, draw(st.integers(0, 30)))


@st.composite
def stacks(draw: st.DrawFn, methods: Sequence[Joined], *, rule: Rule, least: int = 3) -> Case:
    """Draw an ordered subset of `methods`, each once, on a family that all of them and the rule know."""
    count = draw(st.integers(least, len(methods)))
    order = draw(st.permutations(list(methods)))[:count]
    known = rule.among(FAMILIES)
    families = [f for f in known if all(f in j.families for j in order)]
    if not families:
        families = ["bert" if "bert" in known else known[0]]
        order = [j for j in order if families[0] in j.families]
    family = draw(st.sampled_from(families))
    stack = tuple(draw(members(j, f"m{i}", family)) for i, j in enumerate(order))
    dtype = getattr(torch, draw(st.sampled_from(rule.dtypes)))
    return Case(family, dtype, stack, draw(st.integers(0, 30)))
