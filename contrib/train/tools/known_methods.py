"""Write inlay_train/known_methods.json: every method of the packages in this checkout, installed or not.

Reads `pyproject.toml` and sources as text; imports none of them. Run it after adding a method.
"""

from __future__ import annotations

import ast
import json
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
FILE = Path(__file__).resolve().parents[1] / "inlay_train" / "known_methods.json"
PACKAGES = {ROOT: "core", **dict.fromkeys(sorted((ROOT / "plugins").iterdir()), ".")}


def known() -> dict[str, dict[str, str]]:
    """Return {method: its package and the first line of its class's docstring}."""
    found = {}
    for folder, sources in PACKAGES.items():
        project = _project(folder)
        for method, value in project.get("entry-points", {}).get("inlay.methods", {}).items():
            module, _, name = value.partition(":")
            package = folder / sources / module.partition(".")[0]
            found[method] = {"package": project["name"], "what": _first_line(package, name)}
    return dict(sorted(found.items()))


def text() -> str:
    return json.dumps(known(), indent=1, ensure_ascii=False) + "\n"


def _project(folder: Path) -> dict[str, Any]:
    file = folder / "pyproject.toml"
    return dict(tomllib.loads(file.read_text())["project"]) if file.is_file() else {}


def _first_line(package: Path, name: str) -> str:
    """Return the first line of the docstring of the class `name`, wherever it is in the package."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return (ast.get_docstring(node) or "").partition("\n")[0]
    raise SystemExit(f"{package.name} has no class {name}")


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
