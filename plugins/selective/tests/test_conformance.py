"""BitFit and LN tuning keep the rules of docs/conformance.md."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from inlay.authoring import ModuleSite
from inlay.testing import MethodConformance
from inlay_selective import BitFit, LNTuning


class TestBitFit(MethodConformance):
    method = BitFit
    configurations = st.builds(BitFit, terms=st.sampled_from([("all",), ("query", "up"), ("value", "norm")]))
    families = ("gpt2", "bert", "vit")  # the others have no bias terms
    merges = True

    @staticmethod
    def parameters(method: BitFit, sites: Sequence[ModuleSite]) -> int:
        return sum(s.out_features for s in sites)


class TestLNTuning(MethodConformance):
    method = LNTuning
    configurations = st.builds(
        LNTuning,
        terms=st.sampled_from([("weight",), ("weight", "bias")]),
        include_embedding_norm=st.booleans(),
        include_final_norm=st.booleans(),
    )
    merges = True

    @staticmethod
    def parameters(method: LNTuning, sites: Sequence[ModuleSite]) -> int:
        return sum(s.out_features * (1 + (s.has_bias and "bias" in method.terms)) for s in sites)
