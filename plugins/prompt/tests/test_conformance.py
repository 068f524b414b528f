"""The rules of docs/conformance.md for prompt tuning and P-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from inlay.authoring import Site
from inlay.testing import MethodConformance
from inlay_prompt import PromptTuning, PTuning

LENGTHS = st.integers(1, 4)


class TestPromptTuning(MethodConformance):
    method = PromptTuning
    configurations = st.builds(PromptTuning, length=LENGTHS, init=st.sampled_from([None, "uniform"]))
    by_layer = False

    @staticmethod
    def parameters(method: PromptTuning, sites: Sequence[Site]) -> int:
        return sum(method.length * s.out_features for s in sites)


class TestPTuning(MethodConformance):
    method = PTuning
    configurations = st.builds(
        PTuning, length=LENGTHS, encoder=st.just("mlp"), hidden=st.sampled_from([None, 5])
    ) | st.builds(  # of one row alone an LSTM's own state is 0, and what multiplies it does not learn
        PTuning, length=st.integers(2, 4), encoder=st.just("lstm"), hidden=st.sampled_from([None, 5])
    )
    by_layer = False

    @staticmethod
    def parameters(method: PTuning, sites: Sequence[Any]) -> int:
        n, total = method.length, 0
        for d in (s.features for s in sites):
            if method.encoder == "mlp":
                m = method.hidden or d
                total += n * d + (d + 1) * m + (m + 1) * m + (m + 1) * d
            else:
                m = method.hidden or d // 2
                lstm = 4 * (2 * m * (d + m + 2) + 2 * m * (3 * m + 2))
                total += n * d + lstm + (2 * m + 1) * 2 * m + (2 * m + 1) * d
        return total
