"""A rule: a number, what it means, what usually breaks it, and the check itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.testing.cases import Case, Joined

RULES: dict[str, Rule] = {}


class RuleBroken(AssertionError):  # noqa: N818 - reads as a sentence in a failure
    """A method, or a stack of methods, does not keep a rule."""


@dataclass(frozen=True)
class Rule:
    """One numbered guarantee. `check` gets a `Case`, or, with `once`, what the method declared.

    `dtypes` are those it is checked in; `share` is its part of the profile's examples; `concerns`
    says which members it needs: "merging", "lasting" (what cannot merge), or any. `alone` marks
    rules about one method, not checked again over stacks. `families` are those it can be checked on,
    `accepts` the kind of site a method must act on to be asked. `costly` ones are checked on further
    configurations of a method in the long profile alone.
    """

    number: str
    title: str
    means: str
    usually: str
    check: Callable[[Any], None]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    share: float = 1.0
    concerns: str = "any"
    alone: bool = False
    once: bool = False
    families: tuple[str, ...] | None = None
    accepts: str | None = None
    costly: bool = False

    def __call__(self, subject: Case | Joined) -> None:
        """Check `subject`; what it raises says which rule was broken, and what usually breaks it."""
        try:
            self.check(subject)
        except Exception as error:
            error.add_note(
                f"\nrule {self.number}: {self.title}\n  it means: {self.means}\n  usually:  {self.usually}"
                f"\n  checked:  {subject!r}\n  see docs/conformance.md#{self.number.lower()}"
            )
            raise

    def covers(self, joined: Joined) -> bool:
        """Return whether the rule says anything about a method."""
        never, always = joined.merges is False, joined.merges is True
        if (self.concerns == "merging" and never) or (self.concerns == "lasting" and always):
            return False
        accepted = joined.kind.accepts  # where it depends on the configuration, a property
        asked = self.accepts is None or (isinstance(accepted, frozenset) and self.accepts in accepted)
        return asked and bool(self.among(joined.families))

    def among(self, families: Sequence[str]) -> tuple[str, ...]:
        """Return those of `families` the rule can be checked on."""
        return tuple(f for f in families if self.families is None or f in self.families)


def rule(
    number: str, title: str, **settings: Any
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Declare the function below as the check of a rule."""

    def declare(check: Callable[[Any], None]) -> Callable[[Any], None]:
        if number in RULES:
            raise ValueError(f"two rules are called {number}: {RULES[number].title} and {title}")
        RULES[number] = Rule(number, title, check=check, **settings)
        return check

    return declare


def need(condition: object, message: str) -> None:
    """Raise `RuleBroken(message)` unless `condition` holds."""
    if not condition:
        raise RuleBroken(message)


def raises(kind: type[Exception], function: Callable[[], Any], what: str) -> Exception:
    """Call `function`; return the error of `kind` it must raise."""
    try:
        function()
    except kind as error:
        return error
    raise RuleBroken(f"{what} raised nothing; expected {kind.__name__}")
