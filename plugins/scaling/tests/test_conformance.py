"""(IA)^3 and SSF keep the rules of docs/conformance.md."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from inlay.authoring import Site
from inlay.testing import MethodConformance
from inlay_scaling import IA3, SSF


class TestIA3(MethodConformance):
    method = IA3
    configurations = st.builds(IA3)
    targets = (None, ("linear",), ("value",))
    merges = True

    @staticmethod
    def parameters(method: IA3, sites: Sequence[Site]) -> int:
        return sum(s.in_features if s.role == "down" else s.out_features for s in sites)


class TestSSF(MethodConformance):
    method = SSF
    configurations = st.builds(SSF, init_std=st.sampled_from([0.0, 0.02]))
    targets = (None, ("linear",), ("query", "norm"))
    adds_biases = True
    excused = {
        "R07": "a β that starts at 0 gets no gradient below a member that runs an RMSNorm with other values"
    }

    @staticmethod
    def merges(method: SSF, family: str) -> bool:
        return family not in ("llama", "t5") or method.targets == ("linear",)  # an RMSNorm has no place for β

    @staticmethod
    def parameters(method: SSF, sites: Sequence[Site]) -> int:
        return sum(2 * s.out_features for s in sites)
