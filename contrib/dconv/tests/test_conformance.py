"""DConv keeps the rules of inlay's conformance kit."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from inlay.authoring import Site
from inlay.testing import MethodConformance
from inlay_dconv import DConv


class TestDConv(MethodConformance):
    method = DConv
    configurations = st.builds(DConv, size=st.integers(1, 5))
    targets = (None, ("linear",), ("output", "value"))

    @staticmethod
    def parameters(method: DConv, sites: Sequence[Site]) -> int:
        return sum(method.size * site.out_features for site in sites)
