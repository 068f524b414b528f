"""BitFit, LN tuning and FishMask keep the rules of docs/conformance.md."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from inlay.authoring import ModuleSite
from inlay.authoring.sparse import distinct, places
from inlay.testing import MethodConformance
from inlay.testing.cases import FAMILIES
from inlay_selective import BitFit, FishMask, LNTuning


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


class TestFishMask(MethodConformance):
    """On GPT-2 the whole model's fused projections are whole; below DoRA on a slice core refuses that."""

    method = FishMask
    families = ("llama", "bert", "t5", "vit")
    configurations = st.builds(
        FishMask,
        density=st.sampled_from([0.05, 0.3]),
        samples=st.integers(1, 3),
        fisher=st.just("label"),
    )
    replaces = True  # a new head

    @staticmethod
    def parameters(method: FishMask, sites: Sequence[ModuleSite]) -> int:
        return int(method.density * sum(place.size for place in distinct(places(sites))))

    @staticmethod
    def merges(method: FishMask, family: str) -> bool:
        return family != "t5" or method.layers is not None  # its tables are tied


class TestFishMaskInBlocks(TestFishMask):
    families = FAMILIES
    targets = (("linear", "norm"), ("query", "value"), ("ffn",))
    replaces = False
    quantised = False  # packed weights have no gradients to choose by
    merges = True
