"""Which methods are installed, and which of our own packages' could be. Imports nothing heavy.

`inlay methods` must answer in under 0.3 s, so this module and what it imports stay light.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

GROUP = "inlay.methods"
FILE = Path(__file__).with_name("known_methods.json")  # made by tools/known_methods.py


@dataclass(frozen=True)
class Offer:
    """One method as one package offers it; `version` is None where the package is not installed."""

    method: str
    package: str
    version: str | None
    what: str

    @property
    def install(self) -> str | None:
        return None if self.version else f"pip install {self.package}"

    def plain(self) -> dict[str, str | None]:
        return {"method": self.method, "package": self.package, "version": self.version,
                "what": self.what, "install": self.install}  # fmt: skip


def known() -> dict[str, Offer]:
    """Return the methods of our own packages, installed or not."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: Offer(name, entry["package"], None, entry["what"]) for name, entry in content.items()}


def offers() -> tuple[list[Offer], list[Offer]]:
    """Return what is installed, read from package metadata alone, and what else is known."""
    ours = known()
    installed = []
    for entry in sorted(entry_points(group=GROUP)):
        package, version, what = entry.value.partition(":")[0], "?", ""
        if entry.dist is not None:
            package, version = entry.dist.name, entry.dist.version
            what = entry.dist.metadata.get("Summary", "") or ""
        if entry.name in ours and ours[entry.name].package == package:
            what = ours[entry.name].what
        offer = Offer(entry.name, package, version, what)
        if offer not in installed:
            installed.append(offer)
    names = {offer.method for offer in installed}
    return installed, [offer for name, offer in ours.items() if name not in names]


def listing(*, as_json: bool = False) -> str:
    """Return what `inlay methods` prints."""
    installed, absent = offers()
    if as_json:
        return json.dumps({"installed": [o.plain() for o in installed], "known": [o.plain() for o in absent]})
    rows = [(o.method, o.package, o.version or "", o.what) for o in installed]
    lines = columns([("method", "package", "version", ""), *rows])
    if not installed:
        lines = ["no method is installed"]
    if absent:
        lines += ["", "not installed:"]
        lines += columns([(o.method, o.install or "", o.what) for o in absent])
    for name, packages in twice(installed).items():
        lines += ["", f"{name} is offered by {' and '.join(packages)}: uninstall one of them"]
    if (chosen := os.environ.get("INLAY_LOAD_PLUGINS")) is not None:
        lines += ["", f"INLAY_LOAD_PLUGINS={chosen!r} lets inlay use these packages only"]
    return "\n".join(lines)


def twice(installed: Iterable[Offer]) -> dict[str, list[str]]:
    """Return the methods that several packages offer: inlay refuses to choose among them."""
    by_name: dict[str, list[str]] = {}
    for offer in installed:
        by_name.setdefault(offer.method, []).append(offer.package)
    return {name: packages for name, packages in by_name.items() if len(packages) > 1}


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text as aligned lines; what cannot be printed is escaped."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def printable(text: str) -> str:
    """Return `text` with control and invisible characters escaped: it may come from a stranger's file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
