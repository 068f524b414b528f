"""How big things may get: core, a method, a file, the public surface."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import inlay

ROOT = Path(__file__).resolve().parents[2]
counting = runpy.run_path(str(ROOT / "benchmarks" / "counting.py"))
FOLDERS = ("core", "plugins", "contrib", "benchmarks")
SOURCES = sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.py") if "tests" not in p.parts)
SAMPLE = '''"""Doc
string."""

# comment
x = """not
a doc"""  # after code

def f():
    "doc"
    return (
        1
    )

from a import (
    b,
)
'''


def test_counting_leaves_out_blank_lines_comments_and_docstrings() -> None:
    assert counting["code_lines"](SAMPLE) == 7


@pytest.mark.xfail(
    strict=True, reason="core has outgrown its goal; benchmarks/bench_size.py says by how much"
)
def test_core_has_at_most_3000_lines_of_code() -> None:
    """The conformance kit, which no user's process imports, is counted by itself."""
    files = {p: counting["code_lines"](p.read_text()) for p in (ROOT / "core" / "inlay").rglob("*.py")}
    assert sum(lines for path, lines in files.items() if "testing" not in path.parts) <= 3000


def test_each_method_has_at_most_80_lines_of_code() -> None:
    """Its own lines; `benchmarks/bench_size.py` also prints what the methods of a family share."""
    offers = {name: origin.value for name, origin in inlay.methods().items() if origin.version}
    lines = {name: count for name, count in counting["method_lines"](offers).items() if name in offers}
    assert len(lines) > 5
    assert min(lines.values()) >= 8, lines
    assert {name: count for name, count in lines.items() if count > 80} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_have_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_the_public_surface_is_at_most_24_names() -> None:
    assert 0 < len(inlay.__all__) <= 24
    assert sorted(set(inlay.__all__)) == sorted(inlay.__all__)
    assert all(hasattr(inlay, name) for name in inlay.__all__)
