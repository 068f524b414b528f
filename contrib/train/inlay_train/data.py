"""Real text that is on every machine: docstrings of Python's standard library, labelled by package."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from inlay import InlayError

# Packages that every Python from 3.11 on has, with enough documentation to learn from.
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
MASK = "[MASK]"
WORDS, MOST, LEAST = 12, 200, 8
TEST_SHARE = 0.25
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Samples:
    """Texts and their labels (indices into PACKAGES), package by package."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


def docstrings(most: int = MOST, library: Path | None = None) -> Samples:
    """Return at most `most` masked docstrings of at least 12 words for each package.

    Sources are parsed, nothing is imported. A text that two packages share is left out. Within a
    package the order is that of a digest of the text: the same in every process, and nearly the
    same on the next Python.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    found = [set(_of_package(library / name)) for name in PACKAGES]
    texts: list[str] = []
    labels: list[int] = []
    for label, mine in enumerate(found):
        others = set().union(*(theirs for theirs in found if theirs is not mine))
        own = sorted(mine - others, key=_digest)[:most]
        if len(own) < LEAST:
            raise InlayError(
                f"the standard library's package {PACKAGES[label]!r} has too few docstrings to learn from",
                saw=f"{len(own)} of at least {WORDS} words in {library / PACKAGES[label]}",
                do="use a Python whose standard library is installed as source files",
            )
        texts += own
        labels += [label] * len(own)
    return Samples(tuple(texts), tuple(labels))


def split(samples: Samples, share: float = TEST_SHARE) -> tuple[Samples, Samples]:
    """Return (kept, held out): the same share of every label is held out, always the same texts."""
    kept: list[int] = []
    held: list[int] = []
    for label in sorted(set(samples.labels)):
        own = [i for i, known in enumerate(samples.labels) if known == label]
        out = max(1, round(share * len(own)))
        held += own[:out]
        kept += own[out:]
    return _pick(samples, kept), _pick(samples, held)


def masked(text: str) -> str:
    """Return `text` on one line, every package's name hidden, also inside words and in any case."""
    return re.sub("|".join(PACKAGES), MASK, " ".join(text.split()), flags=re.IGNORECASE)


def _of_package(folder: Path) -> Iterator[str]:
    """Yield the package's docstrings, masked; those of its own tests are left out."""
    for file in sorted(folder.rglob("*.py")):
        if {"test", "tests"}.isdisjoint(file.relative_to(folder).parts):
            for node in ast.walk(ast.parse(file.read_bytes())):
                text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
                if text and len(text.split()) >= WORDS:
                    yield masked(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _pick(samples: Samples, indices: Sequence[int]) -> Samples:
    return Samples(tuple(samples.texts[i] for i in indices), tuple(samples.labels[i] for i in indices))
