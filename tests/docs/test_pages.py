"""Every Python code block of the README and the docs runs, page by page, as a reader would type it."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from inlay.registry import registry

ROOT = Path(__file__).resolve().parents[2]
TOP = [ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*/*/README.md"))]
INSTALLED = ("train", "peft_bridge", "trl", "lightning")
STRANGERS = [p for p in PAGES if p.parent.parent.name == "contrib" and p.parent.name not in INSTALLED]
# Translations hold the same code (test_translations.py); strangers are not installed (test_stranger.py).
RUN = [p for p in PAGES if not p.name.endswith(".zh.md") and p not in STRANGERS]
# Their imports take many seconds, and warn of each other.
ENGINES = (ROOT / "docs" / "engines.md", ROOT / "contrib" / "trl" / "README.md")
ENGINE = (pytest.mark.slow, pytest.mark.filterwarnings("default"))
BLOCK = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
LANGUAGES = {"python", "bash", "sh", "text", "json", "toml", ""}


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """Return (first line, language, text) of a page's code blocks."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start()) + 2, m[2], m[3]) for m in BLOCK.finditer(text)]


@pytest.fixture
def clean() -> Iterator[None]:
    """Forget the methods a page registers, and the number of threads it ran with."""
    before, threads = dict(registry._local), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    registry._local.clear()
    registry._local.update(before)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=ENGINE if p in ENGINES else (), id=str(p.relative_to(ROOT))) for p in RUN],
)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # several test processes share few cores; waiting threads would slow each other
    for line, language, text in blocks(page):
        if language == "python":
            padded = "\n" * (line - 1) + text
            exec(compile(padded, str(page), "exec"), module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_have_a_language_that_is_known_and_links_lead_somewhere(page: Path) -> None:
    assert {language for _, language, _ in blocks(page)} <= LANGUAGES
    broken = [
        link for link in LINK.findall(page.read_text()) if not (page.parent / link.partition("#")[0]).exists()
    ]
    assert broken == []


def test_the_pages_have_code_to_run() -> None:
    found = {str(p.relative_to(ROOT)): sum(lang == "python" for _, lang, _ in blocks(p)) for p in PAGES}
    for page in ("README.md", "docs/architecture.md", "docs/composing.md", "docs/checkpoint.md"):
        assert found[page] >= 1, page
    assert found["docs/hooks.md"] >= 12
    assert found["docs/tutorial.md"] >= 5
    assert found["docs/errors.md"] >= 10
    assert found["docs/write-a-method.md"] >= 1


def test_the_readme_is_as_short_as_it_says() -> None:
    """Five lines on what it is, and an example of 15 lines or fewer."""
    text = (ROOT / "README.md").read_text()
    intro = text.split("\n## ")[0].split("\n", 1)[1].strip().splitlines()
    assert len([line for line in intro if line]) <= 5
    example = next(text for _, language, text in blocks(ROOT / "README.md") if language == "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15


def test_the_architecture_names_every_file_of_core_and_only_what_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    core = ROOT / "core" / "inlay"
    named = set(re.findall(r"`(\w+\.py)`", text)) | set(re.findall(r"`(\w+/)`", text))
    there = {p.name for p in core.glob("*.py")} | {
        f"{p.name}/" for p in core.iterdir() if (p / "__init__.py").exists()
    }
    assert there - named == {"__init__.py"}
    assert named - there == set()
    functions = re.findall(r"`([a-z]+)\.([A-Za-z_]+)[`(]", text)
    known = [(m, f) for m, f in functions if f"{m}.py" in there - {"adapter.py"} and f != "py"]
    assert len(known) > 20
    assert [f"{m}.{f}" for m, f in known if not hasattr(import_module(f"inlay.{m}"), f)] == []


def test_every_decision_is_listed_and_says_why_and_what_it_costs() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(folder.glob("0*.md"))
    assert len(pages) >= 5
    assert [p.name for p in pages] == re.findall(r"\((\d{4}-[\w-]+\.md)\)", (folder / "index.md").read_text())
    for page in pages:
        assert all(f"**{word}.**" in page.read_text() for word in ("Decided", "Why", "Costs")), page.name


def test_every_method_has_a_page_that_the_index_lists() -> None:
    ours = {
        o.name for found in registry.origins().values() for o in found if o.distribution.startswith("inlay-")
    }
    index = (ROOT / "docs" / "index.md").read_text()
    assert len(ours) >= 10
    assert {name for name in ours if f"](methods/{name}.md)" not in index} == set()
