"""What is to be checked: a package, module, method or test file, and where its conformance classes are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from packaging.utils import canonicalize_name

from inlay_train.known import GROUP, known
from inlay_train.refusal import refusal

CLASSES = "inlay.conformance"  # entry points that name modules with conformance classes
USUAL = Path("tests", "test_conformance.py")


@dataclass(frozen=True)
class Target:
    """`methods` are checked (none: all that the classes in `paths` are about).

    Their conformance classes are in the files and folders `paths` and in the importable `modules`, as
    `whence` says; for methods that have none, classes are derived.
    """

    name: str
    package: str = ""
    version: str = ""
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    whence: str = ""


def resolve(text: str) -> Target:
    """Return what `text` names: a path, a distribution, a module or a method; raise if it names nothing."""
    path = Path(text)
    if path.suffix == ".py" or len(path.parts) > 1 or text.startswith("."):
        return _path(text, path)
    offered = [e for e in entry_points(group=GROUP) if e.dist is not None]
    ways = (
        lambda e: canonicalize_name(e.dist.name) == canonicalize_name(text),
        lambda e: e.module.partition(".")[0] == text,
        lambda e: e.name == text,
    )
    for number, means in enumerate(ways):
        if found := [e for e in offered if means(e)]:
            return _package(text, found, whole=number < 2)
    if text and path.exists():
        return _path(text, path)
    raise _unknown(text, offered)


def _path(text: str, path: Path) -> Target:
    if not path.exists():
        raise refusal(
            "there is no such file or folder",
            saw=ascii(text)[:200],
            do="name a test file or folder, or an installed package, module or method",
        )
    return Target(name=text, paths=(str(path.resolve()),), whence=str(path))


def _package(text: str, found: list[EntryPoint], *, whole: bool) -> Target:
    """Return a package as a whole, or one method of it."""
    owners = {e.dist.name: e.dist for e in found if e.dist is not None}
    if len(owners) > 1:
        raise refusal(
            f"{text!r} is offered by several packages",
            saw=" and ".join(sorted(owners)),
            do="name one of them; inlay itself uses neither until the other is uninstalled",
        )
    ((name, owner),) = owners.items()
    methods = tuple(sorted({e.name for e in found if whole or e.name == text}))
    paths, modules, whence = declared(owner)
    return Target(text, name, owner.version, methods, paths, modules, whence)


def declared(owner: Distribution) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Return the files and modules in which a distribution has conformance classes, and how that is known."""
    modules = tuple(sorted({e.module for e in owner.entry_points if e.group == CLASSES}))
    if modules:
        return (), modules, f"{', '.join(modules)} (its entry points {CLASSES!r})"
    project = _editable(owner)
    if project is not None and (project / USUAL).is_file():
        return (str(project / USUAL),), (), f"{USUAL.as_posix()} of its editable install"
    return (), (), ""


def _editable(owner: Distribution) -> Path | None:
    """Return the folder of the project of which this is an editable install."""
    said = json.loads(owner.read_text("direct_url.json") or "{}")
    url = urlsplit(said.get("url", ""))
    if url.scheme != "file" or not said.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(unquote(url.path)))


def _unknown(text: str, offered: Iterable[EntryPoint]) -> Exception:
    from inlay.errors import near

    try:
        there = distribution(text)
    except (PackageNotFoundError, ValueError):
        pass
    else:
        return refusal(
            f"the package {there.name} offers no method",
            saw=f"{there.name} {there.version} has no entry point in the group {GROUP!r}",
            do="name a package that has some; `inlay methods` lists them",
        )
    absent = {offer.package for name, offer in known().items() if text in (name, offer.package)}
    names = {e.name for e in offered} | {e.dist.name for e in offered if e.dist is not None}
    return refusal(
        "no installed package, module or method, and no file or folder, is called so",
        saw=ascii(text)[:200],
        do=f"pip install {absent.pop()}" if absent else near(text, names),
    )
