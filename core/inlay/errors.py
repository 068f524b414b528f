"""Errors in three beats: what is wrong, what was seen, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_WORD = 200  # comparing words takes time quadratic in their length


class InlayError(Exception):
    """Base of all errors inlay raises. Carries the three beats as attributes."""

    def __init__(self, what: str, *, saw: str, do: str) -> None:
        self.what, self.saw, self.do = what, saw, do
        super().__init__(f"{what}\n  saw: {saw}\n  do:  {do}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.saw, self.do)


class ConfigError(InlayError):
    """A method's configuration is not valid."""


class TargetError(InlayError):
    """A target does not name what the user thinks it names."""


class RegistryError(InlayError):
    """A method cannot be found, imported or trusted to answer its hooks."""


class AttachError(InlayError):
    """An adapter cannot be placed on, or taken off, this model."""


class StateError(InlayError):
    """The operation is undefined in the state the model is in."""


class MergedError(StateError):
    """The operation is undefined while adapters are merged into the base."""


class RoutingError(InlayError):
    """A batch cannot be split among adapters."""


class CannotMerge(InlayError):  # noqa: N818 - reads as a sentence where it is raised: `raise CannotMerge`
    """A delta has no weight form here, or folding it would change what it means."""


class CheckpointError(InlayError):
    """A checkpoint folder is damaged, hostile, or made for something else."""


class TrainingError(InlayError):
    """Training would not do what the user thinks it does."""


def _rebuild(kind: type[InlayError], what: str, saw: str, do: str) -> InlayError:
    return kind(what, saw=saw, do=do)


def shown(value: object, most: int = MAX_WORD) -> str:
    """Return `repr(value)`, cut; or its type where it has none (integers of thousands of digits)."""
    try:
        return repr(value)[:most]
    except Exception:
        return f"a {type(value).__name__} that cannot be written out"


def near(word: object, known: Iterable[str], count: int = 3) -> str:
    """Return "did you mean …?" for the nearest of `known`, or the first few of them."""
    words = sorted(set(known))
    text = shown(word).strip("'")
    matches = difflib.get_close_matches(text, words, n=count, cutoff=0.5)
    matches.sort(key=lambda m: m.lower() != text.lower())
    if matches:
        return "did you mean " + " or ".join(repr(m) for m in matches) + "?"
    listed = ", ".join(repr(w) for w in words[:12]) + (", …" if len(words) > 12 else "")
    return f"choose among: {listed or '(nothing)'}"
