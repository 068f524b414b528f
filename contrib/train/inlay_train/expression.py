"""The method expression of the command line, and what it needs installed."""

from __future__ import annotations

import ast

import inlay
from inlay.errors import RegistryError
from inlay_train.known import known


def check_installed(text: str) -> None:
    """Raise if the expression names known methods that are not installed; name what installs them all.

    What is not known, or is no expression, is left to core, which says so when it reads the text.
    """
    absent = [known()[name] for name in _names(text) if name in known() and name not in inlay.methods()]
    if absent:
        packages = sorted({offer.package for offer in absent})
        raise RegistryError(
            "the stack needs methods that are not installed",
            saw=", ".join(f"{offer.method} (in {offer.package})" for offer in absent),
            do=f"pip install {' '.join(packages)}",
        )


def _names(text: str) -> list[str]:
    """Return the names an expression uses; nothing is evaluated."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return list(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)))
