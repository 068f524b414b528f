"""The files of a new package: made from templates in memory, then written all or none."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Mapping
from pathlib import Path

from inlay_train.refusal import check_new, refusal
from inlay_train.scaffold.names import Names, check_free

TEMPLATES = Path(__file__).with_name("templates")
SUFFIX = ".jinja"


def create(names: Names, folder: Path) -> list[str]:
    """Write the package into `folder`, new or empty; return the paths of its files in it."""
    files = rendered(names)
    check_free(names, imported(files[f"{names.package}/__init__.py"]))
    check_new(folder, do="choose another --output; nothing is overwritten")
    _write(files, folder)
    return sorted(files)


def rendered(names: Names) -> dict[str, str]:
    """Return the text of each file by its path in the package."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True,
        variable_start_string="<<", variable_end_string=">>", autoescape=False,
    )  # fmt: skip
    places = {"_package_": names.package, "_kind_": names.kind}
    files = {}
    for template in environment.list_templates(extensions=[SUFFIX.removeprefix(".")]):
        path = template.removesuffix(SUFFIX)
        for place, name in places.items():
            path = path.replace(place, name)
        files[path] = environment.get_template(template).render(names=names)
    return files


def imported(source: str) -> frozenset[str]:
    """Return the names a module imports."""
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    return frozenset(alias.asname or alias.name for node in found for alias in node.names)


def _write(files: Mapping[str, str], folder: Path) -> None:
    """Write the files; where that fails, take away again what was written."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except BaseException as error:
        _empty(folder)
        if made and folder.is_dir():
            folder.rmdir()
        if isinstance(error, OSError):
            raise refusal(
                "the package cannot be written",
                saw=f"{error.filename}: {error.strerror}",
                do="choose another --output; nothing of the package was left",
            ) from error
        raise


def _empty(folder: Path) -> None:
    """Remove what is in a folder that was empty before."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
