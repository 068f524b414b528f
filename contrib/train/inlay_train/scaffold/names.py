"""What a new package, its module, method and class are called, and whether those names are free."""

from __future__ import annotations

import builtins
import importlib.util
import keyword
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution

from inlay_train.known import known, offers
from inlay_train.refusal import refusal

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
MOST = 40  # characters
COMMANDS = {"full", "head"}  # `--method` and `--methods` give them a meaning of their own
KIT = "kit_"  # ids of the conformance kit's own methods begin so


@dataclass(frozen=True)
class Names:
    """The names of a package, all made from one: my-method."""

    name: str

    @property
    def distribution(self) -> str:
        return f"inlay-{self.name}"

    @property
    def package(self) -> str:
        return f"inlay_{self.id}"

    @property
    def id(self) -> str:
        return self.name.replace("-", "_")

    @property
    def kind(self) -> str:
        """The class of the method."""
        return "".join(word.capitalize() for word in self.name.split("-"))

    @property
    def delta(self) -> str:
        """The class of its delta."""
        return f"{self.kind}Delta"

    def plain(self) -> dict[str, str]:
        return {"distribution": self.distribution, "package": self.package, "id": self.id,
                "class": self.kind}  # fmt: skip


def named(text: str) -> Names:
    """Return the names made from `text`, which may begin with "inlay-"; raise if it is no name."""
    name = text.removeprefix("inlay-")
    if not NAME.fullmatch(name) or len(name) > MOST:
        raise refusal(
            "this is no name for a method's package",
            saw=ascii(text)[:200],
            do=f"give lower-case words with hyphens between, at most {MOST} characters{_such_as(name)}",
        )
    return Names(name)


def _such_as(text: str) -> str:
    words = re.findall(r"[A-Za-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text))
    name = "-".join(words).lower()
    return f": {name}" if NAME.fullmatch(name) and len(name) <= MOST else ", such as my-method"


def check_free(names: Names, used: frozenset[str]) -> None:
    """Raise if a method, package or module is called so already; `used` are names that the code needs."""
    word = names.id
    if keyword.iskeyword(word) or word in COMMANDS or word.startswith(KIT):
        raise refusal(
            f"a method cannot be called {word!r}",
            saw=_why(word),
            do="choose another name",
        )
    if hidden := {names.kind, names.delta} & (used | set(dir(builtins))):
        raise refusal(
            f"a method cannot be called {word!r}",
            saw=f"its module would have a class {min(hidden)}, which hides what it imports or Python's own",
            do=f"choose another name, such as {names.name}-tuning",
        )
    _check_method(names)
    _check_package(names)


def _why(word: str) -> str:
    if word.startswith(KIT):
        return f"the conformance kit's own methods begin with {KIT!r}"
    return "a command takes this word for something else" if word in COMMANDS else "it is a word of Python"


def _check_method(names: Names) -> None:
    installed, _ = offers()
    for offer in installed:
        if offer.method == names.id:
            raise refusal(
                f"the method {names.id!r} exists",
                saw=f"{offer.package} {offer.version} offers it here",
                do=f"choose another name, or uninstall {offer.package}",
            )
    if names.id in known():
        raise refusal(
            f"the method {names.id!r} exists",
            saw=f"{known()[names.id].package} offers it; it is not installed here",
            do="choose another name: who has both packages could use neither method",
        )


def _check_package(names: Names) -> None:
    try:
        found = distribution(names.distribution)
    except PackageNotFoundError:
        pass
    else:
        raise refusal(
            f"a package is called {names.distribution} already",
            saw=f"{names.distribution} {found.version} is installed here",
            do="choose another name",
        )
    if (spec := importlib.util.find_spec(names.package)) is not None:
        where = spec.origin or ", ".join(spec.submodule_search_locations or ())
        raise refusal(
            f"a module is called {names.package} already, and would hide the new one or be hidden by it",
            saw=where,
            do="choose another name",
        )
