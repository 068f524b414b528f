"""The demo's data: real docstrings whose labels cannot be read off, split the same way every time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from inlay import InlayError
from inlay_train.data import LEAST, MOST, PACKAGES, TEST_SHARE, WORDS, Samples, docstrings, masked, split

PROSE = "Explains in a dozen or more plain words what part number {} of box {} is meant to do."


@pytest.fixture(scope="module")
def samples() -> Samples:
    return docstrings()


def test_this_python_has_enough_of_every_package(samples: Samples) -> None:
    counts = Counter(samples.labels)
    assert set(counts) == set(range(len(PACKAGES)))
    assert min(counts.values()) >= 50
    assert max(counts.values()) <= MOST
    assert len(samples) >= 1000
    assert min(len(text.split()) for text in samples.texts) >= WORDS


def test_no_label_can_be_read_off(samples: Samples) -> None:
    for text in samples.texts:
        assert not any(name in text.casefold() for name in PACKAGES), text
    assert sum("[MASK]" in text for text in samples.texts) > 100


def test_masking_reaches_into_words_and_ignores_case() -> None:
    assert (
        masked("An EmailMessage for\n  asyncio.run, over HTTPS")
        == "An [MASK]Message for [MASK].run, over [MASK]S"
    )
    assert masked("nothing to hide") == "nothing to hide"


def test_no_text_is_there_twice(samples: Samples) -> None:
    assert len(set(samples.texts)) == len(samples)


def test_the_split_is_stratified_and_complete(samples: Samples) -> None:
    kept, held = split(samples)
    assert sorted(kept.texts + held.texts) == sorted(samples.texts)
    label = dict(zip(samples.texts, samples.labels))
    for part in (kept, held):
        assert all(label[text] == known for text, known in zip(part.texts, part.labels))
    for package, count in Counter(samples.labels).items():
        assert abs(Counter(held.labels)[package] - TEST_SHARE * count) <= 0.5


def test_the_split_is_the_same_in_another_process(samples: Samples) -> None:
    program = (
        "from inlay_train.data import *; import hashlib;"
        "print(hashlib.sha256(repr(split(docstrings())).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1234"}
    there = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == hashlib.sha256(repr(split(samples)).encode()).hexdigest()


def library(folder: Path, count: int = LEAST) -> Path:
    """Write packages that stop any program that imports them, with `count` docstrings each."""
    for box, name in enumerate(PACKAGES):
        texts = [PROSE.format(i, box) for i in range(count)]
        texts += [PROSE.format("one", "shared"), "Too short to learn from."]
        body = "\n\n".join(f'def f{i}():\n    """{text}"""' for i, text in enumerate(texts))
        for file in ("inner/code.py", "tests/code.py"):
            (folder / name / file).parent.mkdir(parents=True)
            (folder / name / file).write_text(f"raise SystemExit\n\n{body}\n".replace("Explains", file))
    return folder


def test_sources_are_parsed_and_the_right_docstrings_taken(tmp_path: Path) -> None:
    found = docstrings(library=library(tmp_path, 20))
    wanted = {
        PROSE.format(i, box).replace("Explains", "inner/code.py") for i in range(20) for box in range(8)
    }
    assert set(found.texts) == wanted
    assert [f"box {label} " in text for label, text in zip(found.labels, found.texts)] == [True] * 160
    assert Counter(docstrings(12, tmp_path).labels) == dict.fromkeys(range(8), 12)


def test_too_few_docstrings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InlayError, match=r"'asyncio' has too few docstrings.*\n.*saw: 3 of at least 12 words"
    ):
        docstrings(library=library(tmp_path, 3))
