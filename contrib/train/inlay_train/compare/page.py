"""The page of a comparison: one HTML file with everything in it, that asks nothing of any network."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from inlay_train.compare import table
from inlay_train.compare.engine import Result

CAPTIONS = {
    "share.png": "How much is trained, against how well it does",
    "time.png": "How long it trains, against how well it does",
    "curves.png": "How it learns",
}


def page(result: Result, pictures: Mapping[str, bytes], *, title: str, about: str, machine: str) -> str:
    """Return the page. Everything a user wrote is escaped."""
    environment = Environment(
        loader=PackageLoader("inlay_train.compare", "."), autoescape=True, undefined=StrictUndefined
    )
    rows = table.ranked(result.rows)
    images = [
        (CAPTIONS[name], "data:image/png;base64," + base64.b64encode(content).decode())
        for name, content in pictures.items()
    ]
    return environment.get_template("page.html").render(
        title=title, about=about, machine=machine, metric=rows[0].metric, columns=table.COLUMNS[1:],
        rows=[(table.measured(row), table.cells(row)) for row in rows],
        failed=result.failed, notes=table.notes(result), images=images,
    )  # fmt: skip


def save(text: str, folder: Path) -> Path:
    path = folder / "comparison.html"
    path.write_text(text, encoding="utf-8")
    return path
