"""The Chinese pages follow the English ones: the same code, the same sections, the same links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README", "docs/tutorial"]
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^)]+)\)")


def pair(page: str) -> tuple[str, str]:
    return tuple((ROOT / f"{page}{end}.md").read_text(encoding="utf-8") for end in ("", ".zh"))  # type: ignore[return-value]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_is_the_same(page: str) -> None:
    english, chinese = pair(page)
    assert BLOCK.findall(chinese) == BLOCK.findall(english)
    assert len(BLOCK.findall(english)) >= 4


@pytest.mark.parametrize("page", PAGES)
def test_the_sections_links_and_names_are_the_same(page: str) -> None:
    english, chinese = (BLOCK.sub("", text) for text in pair(page))
    assert [len(h) for h in re.findall("^#+", chinese, re.M)] == [
        len(h) for h in re.findall("^#+", english, re.M)
    ]
    assert chinese.count("\n- ") == english.count("\n- ")
    assert chinese.count("\n| ") == english.count("\n| ")
    assert set(CODE.findall(chinese)) == set(CODE.findall(english))
    assert links(chinese) == links(english)
    assert len(re.findall("[\u4e00-\u9fff]", chinese)) > 400


def links(text: str) -> set[str]:
    """Return where a page leads, in whichever language."""
    return {link.replace(".zh.md", ".md") for link in LINK.findall(text)}
