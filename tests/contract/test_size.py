"""The rehearsal's own rule: a method to come takes at most 80 lines of code on this contract."""

from __future__ import annotations

import ast
import tokenize
from pathlib import Path

import pytest

LIMIT = 80
METHODS = sorted(p for p in (Path(__file__).parent / "rehearsal").glob("*.py") if p.stem != "__init__")
NOISE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
         tokenize.ENDMARKER, tokenize.ENCODING}  # fmt: skip
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def lines_of_code(path: Path) -> int:
    """Return how many lines hold code: no blank line, comment or docstring; an import counts once."""
    tree = ast.parse(path.read_text())
    docs: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):  # how many lines the formatter gives the list
            docs |= set(range(node.lineno + 1, (node.end_lineno or 0) + 1))
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docs |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in NOISE]
    code = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    return len(code - docs)


def test_all_five_are_here() -> None:
    assert [p.stem for p in METHODS] == [
        "adapter_fusion", "hyperformer", "loreft", "molora", "unipelt",
    ]  # fmt: skip


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_at_most_eighty_lines(path: Path) -> None:
    assert 20 < lines_of_code(path) <= LIMIT


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_only_the_authoring_surface(path: Path) -> None:
    """A method imports torch, the standard library, `inlay.authoring`, and nothing else of core."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        wrong = [n for n in names if n.split(".")[0] == "inlay" and n != "inlay.authoring"]
        assert not wrong, f"{path.name} imports {wrong}"


SAMPLE = '''"""Doc."""

# comment
from a import (
    b,
    c,
)
x = (
    1,
)


def f():
    """Doc
    of two lines."""
    return x  # why
'''


def test_the_counter_sees_code_and_nothing_else(tmp_path: Path) -> None:
    """One import, three lines of x, two of f."""
    file = tmp_path / "sample.py"
    file.write_text(SAMPLE)
    assert lines_of_code(file) == 6
