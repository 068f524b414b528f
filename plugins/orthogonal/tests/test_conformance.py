"""OFT, BOFT, HRA and RoAd keep the rules of docs/conformance.md."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from inlay.authoring import Site
from inlay.testing import MethodConformance
from inlay_orthogonal import BOFT, HRA, OFT, RoAd


class TestOFT(MethodConformance):
    method = OFT
    configurations = st.builds(
        OFT,
        block_size=st.sampled_from([4, 8]),
        cayley=st.sampled_from(["series", "exact"]),
        terms=st.sampled_from([4, 6]),
        shared=st.booleans(),
        dropout=st.sampled_from([0.0, 0.5]),
    )
    targets = (None, ("linear",), ("attention", "up"))
    merges = True

    @staticmethod
    def parameters(method: OFT, sites: Sequence[Site]) -> int:
        b = method.block_size
        return sum((1 if method.shared else s.in_features // b) * b * (b - 1) // 2 for s in sites)


class TestCOFT(TestOFT):
    """OFT whose turns stay within a ball."""

    configurations = st.builds(OFT, block_size=st.just(4), epsilon=st.sampled_from([1.0, 3.0]))


class TestOFTOnEmbeddings(MethodConformance):
    method = OFT
    configurations = st.builds(OFT, block_size=st.sampled_from([4, 8]))
    families = ("llama", "gpt2", "bert")
    targets = (("embedding",),)
    by_layer = False

    @staticmethod
    def merges(method: OFT, family: str) -> bool:
        return family != "gpt2"  # its table is tied to the head

    @staticmethod
    def parameters(method: OFT, sites: Sequence[Site]) -> int:
        return sum(s.out_features * (method.block_size - 1) // 2 for s in sites)


class TestBOFT(MethodConformance):
    method = BOFT
    configurations = st.builds(
        BOFT,
        block_size=st.sampled_from([2, 4]),
        factors=st.integers(1, 3),
        dropout=st.sampled_from([0.0, 0.5]),
    )
    targets = (None, ("linear",), ("query", "down"))
    merges = True

    @staticmethod
    def parameters(method: BOFT, sites: Sequence[Site]) -> int:
        b, m = method.block_size, method.factors
        return sum(m * s.in_features * (b - 1) // 2 + s.out_features for s in sites)


class TestHRA(MethodConformance):
    method = HRA
    configurations = st.builds(HRA, rank=st.sampled_from([2, 4]), penalty=st.sampled_from([0.0, 0.1]))
    targets = (None, ("linear",), ("attention", "up"))
    start_tolerance = 1e-5
    merges = True

    @staticmethod
    def parameters(method: HRA, sites: Sequence[Site]) -> int:
        return sum(method.rank * s.in_features for s in sites)


class TestHRAGramSchmidt(TestHRA):
    """Any rank, and a start away from the base."""

    configurations = st.builds(HRA, rank=st.integers(1, 3), form=st.just("gram_schmidt"))
    targets = (None, ("query",))  # directions cannot be scaled to a small effect where there are many


class TestRoAd(MethodConformance):
    method = RoAd
    configurations = st.builds(
        RoAd, variant=st.sampled_from(["road_1", "road_2", "road_4"]), group_size=st.sampled_from([2, 8])
    )
    targets = (None, ("linear",), ("key", "up"))
    merges = True

    @staticmethod
    def parameters(method: RoAd, sites: Sequence[Site]) -> int:
        return sum(
            int(s.out_features * {"road_1": 1, "road_2": 2, "road_4": 4}[method.variant]) for s in sites
        )
