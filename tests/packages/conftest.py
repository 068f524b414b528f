"""Makes `environments` importable; builds wheels once and environments from them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from environments import Wheels

    return Wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture
def environment(tmp_path: Path, wheels: Any) -> Callable[..., Path]:
    """Return a function that makes a venv with these of our packages, and gives its python."""
    from environments import environment as make

    return lambda *packages: make(tmp_path / "env", wheels, *packages)
