"""Counting code: lines that are neither blank, comment nor docstring; an import counts once.

(However many names it lists: how many lines the formatter gives them says nothing.)
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

QUIET = {getattr(tokenize, kind) for kind in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")}


def code_lines(source: str) -> int:
    """Return how many lines of a module hold code."""
    return len(_code(source))


def method_lines(offers: Mapping[str, str]) -> dict[str, int]:
    """Return the code lines of each method, and of what several methods of one package share.

    `offers` maps ids to entry points ("module:Class"). A method's lines are those of its package
    that it reaches by name (its class, the classes, functions, constants and imports it uses) and
    no other method does, but for one that is made of all of it (a subclass); "<package> shared" are
    the others.
    """
    reached = {name: _reached(value) for name, value in offers.items()}
    packages = {name: value.partition(":")[0].partition(".")[0] for name, value in offers.items()}
    found: dict[str, int] = {}
    for name, lines in reached.items():
        near = [reached[n] for n in offers if n != name and packages[n] == packages[name]]
        beside = [others for others in near if len(lines - others) > 1]  # 1: the line that offers it
        shared = lines & set().union(*beside)
        found[name] = len(lines - shared)
        if shared:
            whole = set().union(*(a & b for a in [lines, *beside] for b in [lines, *beside] if a is not b))
            found[f"{packages[name]} shared"] = len(whole)
    return found


def _reached(value: str) -> set[tuple[Path, int]]:
    """Return every (file, line) of code that a method reaches in its own package (in core: module)."""
    module, _, name = value.partition(":")
    package = module.partition(".")[0]
    found: dict[Path, set[int]] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(module, name)]
    while todo:
        where, wanted = todo.pop()
        if (where, wanted) in seen or (path := _path(where)) is None:
            continue
        seen.add((where, wanted))
        for node in _binding(ast.parse(path.read_text()), wanted):
            found.setdefault(path, set()).update(_span(node))
            if not isinstance(node, ast.ImportFrom):
                todo += [(where, used) for used in _names(node)]
            elif package != "inlay" and (node.module or "").partition(".")[0] == package:
                todo.append((str(node.module), wanted))
    return {(path, line) for path, lines in found.items() for line in _code(path.read_text()) & lines}


def _code(source: str) -> set[int]:
    quiet = set(_quiet(ast.parse(source)))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in QUIET:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - quiet


def _quiet(tree: ast.Module) -> Iterator[int]:
    """Yield the lines of docstrings, and of imports all but the first."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from range(node.lineno + 1, (node.end_lineno or node.lineno) + 1)
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        text = first.value if isinstance(first, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            yield from range(text.lineno, (text.end_lineno or text.lineno) + 1)


def _binding(tree: ast.Module, name: str) -> list[ast.stmt]:
    """Return the top-level statements that give `name` its value."""
    found: list[ast.stmt] = []
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.If) else [node]:
            if name in _bound(inner):
                found.append(inner)
    return found


def _bound(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)}


def _names(node: ast.stmt) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _span(node: ast.stmt) -> range:
    decorators = getattr(node, "decorator_list", [])
    return range(min([node.lineno, *(d.lineno for d in decorators)]), (node.end_lineno or node.lineno) + 1)


def _path(module: str) -> Path | None:
    found = find_spec(module)
    return None if found is None or found.origin is None else Path(found.origin)
