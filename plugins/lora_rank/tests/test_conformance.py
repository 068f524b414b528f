"""AdaLoRA and DyLoRA keep the rules of docs/conformance.md."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from inlay.authoring import Site
from inlay.testing import MethodConformance
from inlay_lora_rank import AdaLoRA, DyLoRA


class TestAdaLoRA(MethodConformance):
    method = AdaLoRA
    configurations = st.builds(
        AdaLoRA,
        rank=st.sampled_from([3, 4]),
        target_rank=st.sampled_from([2, 3]),
        dropout=st.sampled_from([0.0, 0.5]),
        every=st.integers(1, 2),
        orthogonality=st.sampled_from([0.0, 0.5]),
    )
    targets = (None, ("query", "value"), ("key", "up"))
    merges = True

    @staticmethod
    def parameters(method: AdaLoRA, sites: Sequence[Site]) -> int:
        return sum(method.rank * (s.in_features + s.out_features + 1) for s in sites)


class TestDyLoRA(MethodConformance):
    method = DyLoRA
    configurations = st.builds(
        DyLoRA,
        rank=st.integers(2, 4),
        dropout=st.sampled_from([0.0, 0.5]),
        frozen=st.booleans(),
        eval_rank=st.sampled_from([None, 2]),
    )
    targets = (None, ("linear",), ("key", "up"))
    merges = True

    @staticmethod
    def parameters(method: DyLoRA, sites: Sequence[Site]) -> int:
        return sum(method.rank * (s.in_features + s.out_features) for s in sites)
