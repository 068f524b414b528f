"""What every test here needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def accelerate_forgets() -> Iterator[None]:
    """Let each test choose its own Accelerator: a process keeps the first one's settings."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
