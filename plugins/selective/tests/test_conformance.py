"""BitFit, LN tuning, FishMask and LT-SFT keep the rules of docs/conformance.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import strategies as st

from inlay.authoring import ModuleSite
from inlay.authoring.sparse import distinct, places
from inlay.authoring.trained import shapes
from inlay.testing import MethodConformance
from inlay.testing.cases import FAMILIES
from inlay_selective import LTSFT, BitFit, FishMask, LNTuning


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


class TestLTSFT(MethodConformance):
    """Its first stage, in which every entry learns."""

    method = LTSFT
    configurations = st.builds(LTSFT, density=st.sampled_from([0.01, 0.1]), rounds=st.sampled_from([1, 2]))
    targets = (("linear",), ("query", "down"))
    merges = True

    @staticmethod
    def parameters(method: LTSFT, sites: Sequence[ModuleSite]) -> int:
        return sum(math.prod(shapes(p.site)[p.name == "bias"]) for p in distinct(places(sites)))


class TestLTSFTOnEmbeddings(TestLTSFT):
    """With its penalty, and tables that are tied."""

    configurations = st.builds(LTSFT, penalty=st.just(0.1), rounds=st.just(1))
    families = ("llama", "gpt2", "bert", "t5")
    targets = (None,)
    by_layer = False
    excused = {"R32": "its penalty, the sum of |δ|, has a kink at 0"}

    @staticmethod
    def merges(method: LTSFT, family: str) -> bool:
        return family not in ("gpt2", "t5")  # their tables are tied
