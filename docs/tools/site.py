"""The pages of the site that lie outside docs/, and links that work there and in the repository alike.

A page links to files as they lie in the repository (`../README.md`, `docs/index.md`); the site has
all pages in one tree. What a page links to outside of it (`../core/...`) is not linked in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")
PLACES = {"README.md": "readme.md", "README.zh.md": "readme.zh.md"}  # an index page's name in mkdocs
LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie at the top of the repository."""
    for name in OUTSIDE:
        if (ROOT / name).is_file():
            text = (ROOT / name).read_text(encoding="utf-8")
            files.append(File.generated(config, PLACES.get(name, name), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the site's pages; unlink what the site does not have."""
    here = page.file.src_uri
    origin = {place: name for name, place in PLACES.items()}.get(here, here)
    repository = origin if origin in OUTSIDE else f"docs/{origin}"
    pieces = CODE.split(markdown)
    pieces[::2] = [LINK.sub(lambda m: _link(m, repository, here, files), text) for text in pieces[::2]]
    return "".join(pieces)


def _link(match: re.Match[str], repository: str, here: str, files: Files) -> str:
    """Return a link found in the file `repository` as the page `here` of the site must write it."""
    text, target, anchor = match[1], match[2], match[3] or ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(repository), target))
    if not (ROOT / path).exists():
        return match[0]  # mkdocs warns of it
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "index.md")
    place = PLACES.get(path, path) if path in OUTSIDE else path.removeprefix("docs/")
    inside = path in OUTSIDE or path.startswith("docs/")
    if not inside or files.get_file_from_path(place) is None:
        return text
    return f"[{text}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{anchor})"
