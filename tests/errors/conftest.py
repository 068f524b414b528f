"""Makes `packages` importable; one thread per worker; packages on sys.path without an installation."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from inlay.registry import GROUP

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Return a function that puts a distribution with entry points and one module on sys.path."""
    made: list[str] = []

    def install(
        distribution: str, code: str, *, group: str = GROUP, version: str = "1.0", **entries: str
    ) -> Path:
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
        module = distribution.replace("-", "_")
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
        made.append(module)
        monkeypatch.syspath_prepend(folder)
        return folder

    yield install
    for module in made:
        sys.modules.pop(module, None)


@pytest.fixture
def base() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
