"""The page and pictures of a comparison: what is in them, and what a real browser shows of them."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from inlay_train.compare import charts, page, table
from inlay_train.compare.engine import Result, Row

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def row(stack: str, values: list[float], parameters: int, **more: object) -> Row:
    content = {
        "stack": stack, "trained": stack, "rate": 1.0, "metric": "accuracy", "values": values,
        "higher_is_better": True, "parameters": parameters, "share": parameters / 1e6,
        "file_bytes": 1_350_000, "step_seconds": 0.25, "seconds": 130.0, "peak_bytes": 874_000_000,
        "merges": "yes", "steps": 20,
        "losses": [(float(i), 2.0 / (i + 1)) for i in range(20)], "curve": [], "tried": {}, "failed": [],
        "runs": [], **more,
    }  # fmt: skip
    return Row(**content)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def result() -> Result:
    rows = [
        row("lora(rank=8)", [0.91, 0.92, 0.93], 20_000, tried={"0.5": 0.9, "1": 0.92}),
        row("head", [0.81], 500, rate=None, losses=[], step_seconds=0.0, merges="no", seconds=2.5),
        row("lora <b>&", [0.95, 0.96, 0.97], 30_000, trained="lora(rank=9)", failed=["ended by SIGKILL"]),
    ]
    return Result(rows, {"ia3": "ended by SIGKILL"})


@pytest.fixture(scope="module")
def pictures(result: Result) -> dict[str, bytes]:
    return charts.draw(table.ranked(result.rows), "2 cores, somewhere")


@pytest.fixture(scope="module")
def text(result: Result, pictures: dict[str, bytes]) -> str:
    return page.page(result, pictures, title="Which one?", about="A test.", machine="2 cores, somewhere")


def test_rows_are_ranked_and_told_in_full(text: str) -> None:
    body = [
        re.sub(r"<[^>]+>", "|", line)
        for line in text.splitlines()
        if line.startswith(("<tr><td>", "<tr class"))
    ]
    cells = [[cell for cell in line.split("|") if cell] for line in body]
    assert cells[0][:4] == ["lora &lt;b&gt;&amp;", "96.0 % ± 1.0 (3 seeds)", "30,000", "3 %"]
    assert cells[1] == ["lora(rank=8)", "92.0 % ± 1.0 (3 seeds)", "20,000", "2 %", "1.35 MB", "250 ms",
                        "2.2 min", "874 MB", "yes", "×1"]  # fmt: skip
    assert cells[2] == ["head", "81.0 % (1 seed)", "500", "0.05 %", "1.35 MB", "–", "2.5 s", "874 MB", "no"]
    assert cells[3] == ["ia3", "failed: ended by SIGKILL"]


def test_what_a_reader_must_know_is_said(text: str) -> None:
    assert "lora(rank=8): rates tried on held-out training rows: ×0.5: 90.0, ×1: 92.0 — the edge" in text
    assert "trained as lora(rank=9)" in text
    assert "a run failed and is left out: ended by SIGKILL" in text
    assert "2 cores, somewhere" in text


def test_the_page_needs_nothing_else(text: str, pictures: dict[str, bytes]) -> None:
    assert "http" not in text
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 3
    found = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert found == list(pictures.values())


def test_every_stack_is_in_every_picture(pictures: dict[str, bytes]) -> None:
    for name, content in pictures.items():
        image = Image.open(io.BytesIO(content))
        assert image.size == (1056, 550)
        assert pixels(image, BLUE) > 50, name
        assert pixels(image, ORANGE) > 50, name


def pixels(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return sum(count for count, found in image.convert("RGB").getcolors(1 << 24) or () if found == colour)


def test_the_terminal_has_room_for_the_table(result: Result) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table.terminal(result, "Which one?"))
    said = console.export_text()
    assert re.search(r"lora\(rank=8\) +92\.0 ± 1\.0 +20 k +2 % +1\.35 MB +250 ms +874 MB +yes", said)
    assert re.search(r"ia3 +failed", said)
    assert "…" not in said


def test_long_names_lose_their_settings_where_that_tells_them_apart() -> None:
    assert table.brief(["lora(rank=8, alpha=16.0)", "ia3"], 10) == ["lora", "ia3"]
    both = ["lora(rank=8, alpha=16.0)", "lora(rank=9, alpha=16.0)"]
    assert table.brief(both, 10) == both


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_a_browser_shows_table_and_pictures(text: str, tmp_path: Path) -> None:
    """If this fails: look at the screenshot; a picture that is not decoded leaves no colour of its own."""
    file = page.save(text, tmp_path)
    shot = tmp_path / "shot.png"
    subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,2400", f"--screenshot={shot}",
         file.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    image = Image.open(shot)
    top, rest = image.crop((0, 0, 1300, 420)), image.crop((0, 420, 1300, 2400))
    assert pixels(top, (0xEE, 0xF5, 0xFB)) > 1000  # the best row's background
    assert pixels(rest, BLUE) > 300
    assert pixels(rest, ORANGE) > 300
