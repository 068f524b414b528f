"""Every error core can raise has a test that knows its text.

The walk finds each place in core where the first beat of an error, or the reason inside one, is
written down. A place counts as tested if some test's strings hold a literal part of that text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from inlay import errors

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "core" / "inlay"
TESTS = ("tests", "plugins/*/tests", "contrib/*/tests")
LEAST = 14  # characters of a message that a test must name
WORDS = 8  # a piece of fewer characters is punctuation, and a message of such pieces has no words of its own

KINDS = {n for n, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
# Functions that make or raise an error, and the position of the argument with the words of their own.
MAKERS = {"damaged": 0, "_rejected": 1, "_unreadable": 1, "_refuse": 2}
# Words given to a variable or returned, to become part of an error.
REASONS = {"reason", "wrong"}
REASONING = {"_shared_with", "miswritten", "why_not"}


@dataclass(frozen=True)
class Message:
    """The words of one error: where they stand, and their literal pieces between what is filled in."""

    place: str
    pieces: tuple[str, ...]

    def known_to(self, text: str) -> bool:
        """Whether a test's string and a literal piece of the message overlap by enough characters."""
        return any(_overlap(piece.strip(), text.strip()) for piece in self.pieces)

    def __str__(self) -> str:
        return f"{self.place}: {'…'.join(self.pieces)}"


def _overlap(piece: str, text: str) -> bool:
    """Whether one holds the other, or one ends as the other begins."""
    if len(piece) < WORDS or len(text) < WORDS:
        return False
    if piece in text or (text in piece and len(text) >= LEAST):
        return True
    sizes = range(LEAST, min(len(piece), len(text)))
    return any(text.endswith(piece[:k]) or text.startswith(piece[-k:]) for k in sizes)


def pieces(node: ast.expr) -> tuple[str, ...] | None:
    """Return the literal pieces of a text, or None if it is no text written there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return (node.value,) if node.value.strip() else None
    if isinstance(node, ast.JoinedStr):
        return tuple(p.value for p in node.values if isinstance(p, ast.Constant) and str(p.value).strip())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (*(pieces(node.left) or ()), *(pieces(node.right) or ())) or None
    return None


def words(node: ast.AST, inside: str) -> Iterator[ast.expr]:
    """Yield the expressions of a node that become the words of an error."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        position = 0 if name in KINDS else MAKERS.get(name)
        if position is not None and len(node.args) > position:
            yield node.args[position]
    elif (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in REASONS) or (
        isinstance(node, ast.Return) and inside in REASONING and node.value is not None
    ):
        yield node.value
    elif (
        isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", "") not in KINDS
    ):
        yield from node.exc.args[:1]


# Where the literal text of a regular expression stops.
SPLIT = re.compile(r"\[\\s\\S\]\*|\.\*|\\w\+|\||(?<!\\)[()]")


@cache
def messages() -> tuple[Message, ...]:
    found = []
    for path in sorted(CORE.rglob("*.py")):
        if "testing" in path.parts:  # the kit's own failures are assertions about a method
            continue
        tree = ast.parse(path.read_text())
        for outer in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]:
            own = ast.walk(outer) if isinstance(outer, ast.FunctionDef) else iter(())
            for node in own:
                for expression in words(node, outer.name if isinstance(outer, ast.FunctionDef) else ""):
                    if (text := pieces(expression)) and max(len(piece.strip()) for piece in text) >= WORDS:
                        found.append(Message(f"{path.relative_to(ROOT)}:{expression.lineno}", text))
    return tuple(dict.fromkeys(found))


@cache
def known_strings() -> tuple[str, ...]:
    """Return every string of the tests, docstrings left out, regular expressions as the text they mean."""
    found: set[str] = set()
    for folder in (f for pattern in TESTS for f in ROOT.glob(pattern)):
        for path in {*folder.rglob("*.py")} - {Path(__file__).resolve()}:
            tree = ast.parse(path.read_text())
            docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, DOCUMENTED) and _has_doc(n)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                    found |= {*SPLIT.split(node.value), node.value}
    return tuple(re.sub(r"\\(.)", r"\1", text) for text in found if len(text.strip()) >= 4)


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def _has_doc(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr)


def test_the_walk_finds_core() -> None:
    assert len(messages()) > 90
    assert any("matches nothing in this" in str(m) for m in messages())
    assert any("tied to" in str(m) for m in messages())


@pytest.mark.parametrize("message", messages(), ids=str)
def test_a_test_knows_the_text(message: Message) -> None:
    assert any(message.known_to(text) for text in known_strings()), f"no test names a part of: {message}"


def test_a_text_that_no_test_names_is_noticed() -> None:
    message = Message("nowhere", ("no hippo" + "potamus flies ", " over a" + " submarine"))
    assert not any(message.known_to(text) for text in known_strings())
    assert message.known_to(f"{message.pieces[0]}three times")
    assert message.known_to(f"it flies{message.pieces[1]}")
    assert not message.known_to("over a")


def test_bare_exceptions_are_not_raised() -> None:
    """Users see InlayError; what else is raised is caught again in core, or says that a part is abstract."""
    allowed = {"NotImplementedError", "ValueError", "AttributeError", "TimeoutError", "Entered", "Unfit"}
    for path in CORE.rglob("*.py"):
        if "testing" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))
                assert name in KINDS | allowed | {
                    *MAKERS,
                    "refused_while_merged",
                    "_nothing",
                    "_not_installed",
                    "_nothing_learns",
                    "_diverged",
                }, (path, name)
