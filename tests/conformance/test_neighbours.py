"""The kit's own small methods keep every rule: one class for each face; and so do core's own."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hypothesis import strategies as st

from inlay.authoring.dense import Dense
from inlay.authoring.trained import shapes
from inlay.testing import Joined, MethodConformance
from inlay.testing import neighbours as kit

EXCUSED = {"R25": "the kit's methods live beside Hypothesis strategies", "R26": "they come from no paper"}


def held(joined: Joined) -> type[MethodConformance]:
    """Return a test class that holds one of the kit's methods to the rules."""
    names = [f.name for f in dataclasses.fields(joined) if f.name not in ("kind", "name")]
    declared: dict[str, Any] = {name: getattr(joined, name) for name in names}
    ours = joined.kind.id.startswith("kit_")
    declared |= {
        "method": joined.kind,
        "excused": EXCUSED if ours else {"R26": EXCUSED["R26"]},
        "parameters": staticmethod(joined.parameters),
    }
    return type(f"Test{joined.kind.__name__}", (MethodConformance,), declared)


DENSE = Joined(
    Dense, st.builds(Dense), merges=True, targets=(None, ("query", "norm"), ("embedding",)), by_layer=False,
    families=("llama", "bert"),
    parameters=lambda _, sites: sum(math.prod(s) for x in sites for s in shapes(x)[: 1 + x.has_bias]),
)  # fmt: skip

TestLowRank = held(kit.LOW_RANK)
TestGain = held(kit.GAIN)
TestBend = held(kit.BEND)
TestBlock = held(kit.BLOCK)
TestShift = held(kit.SHIFT)
TestColumns = held(kit.COLUMNS)
TestRows = held(kit.ROWS)
TestHead = held(kit.HEAD)
TestOwn = held(kit.OWN)
TestDense = held(DENSE)
