"""The page of errors has a section per class, whose example raises it and prints what the page says."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from inlay import errors

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
PYTHON = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
}


def sections() -> dict[str, str]:
    """Return the text under each heading; what comes before the first under ""."""
    pieces = re.split(r"^## (\w+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {"": pieces[0], **dict(zip(pieces[1::2], pieces[2::2], strict=True))}


def test_every_class_of_errors_has_a_section_and_an_example() -> None:
    found = sections()
    assert found.keys() - {""} == KINDS.keys()
    for name in KINDS.keys() - {"InlayError"}:
        [(code, printed)] = PYTHON.findall(found[name])
        assert f"except errors.{name} as error" in code
        assert printed.strip(), name


def test_the_examples_print_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    world: dict[str, object] = {}
    for name, text in sections().items():
        for code, printed in PYTHON.findall(text):
            shown = io.StringIO()
            with redirect_stdout(shown):
                exec(compile(code, f"{PAGE.name}: {name}", "exec"), world)
            assert shown.getvalue() == printed, name
