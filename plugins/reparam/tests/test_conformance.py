"""Every reparameterisation keeps the rules of docs/conformance.md."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from inlay.authoring import Site
from inlay.testing import MethodConformance
from inlay_reparam import DeLoRA, FourierFT, MiSS, RandLoRA, VBLoRA, VeRA, WaveFT

DROPOUT = st.sampled_from([0.0, 0.1])


class TestVeRA(MethodConformance):
    method = VeRA
    configurations = st.builds(
        VeRA, rank=st.integers(1, 6), d_initial=st.sampled_from([0.1, 1.0]), dropout=DROPOUT,
        key=st.integers(0, 3), save_projection=st.booleans(),
    )  # fmt: skip
    targets = (None, ("linear",), ("attention", "up"))
    merges = True

    @staticmethod
    def parameters(method: VeRA, sites: Sequence[Site]) -> int:
        return sum(method.rank + s.out_features for s in sites)


class TestMiSS(MethodConformance):
    """Not rank 1: it reads the sum of x, which is 0 behind a layer norm without gain or bias."""

    method = MiSS
    configurations = st.builds(MiSS, rank=st.integers(2, 12), dropout=DROPOUT) | st.builds(
        MiSS, rank=st.integers(2, 12), mode=st.just("mini"), mini_rank=st.just(1)
    )
    targets = (None, ("linear",), ("attention", "up"))
    merges = True

    @staticmethod
    def parameters(method: MiSS, sites: Sequence[Site]) -> int:
        return sum(
            method.rank * (method.mini_rank if method.mode == "mini" else s.out_features) for s in sites
        )


class TestMiSSBat(MethodConformance):
    """On R37's layers of 12, 20 and 5 features nothing but tiles of 1 fits."""

    method = MiSS
    configurations = st.builds(MiSS, rank=st.just(1), mode=st.just("bat"), dropout=DROPOUT)
    targets = (None, ("attention",), ("up", "down"))
    merges = True

    @staticmethod
    def parameters(method: MiSS, sites: Sequence[Site]) -> int:
        return sum(method.rank * s.out_features for s in sites)


class TestDeLoRA(MethodConformance):
    method = DeLoRA
    configurations = st.builds(
        DeLoRA, rank=st.integers(1, 4), strength=st.sampled_from([0.5, 4.0]), dropout=DROPOUT,
        start=st.sampled_from(["zero", "random"]), strength_lr_ratio=st.sampled_from([1.0, 2.0]),
    )  # fmt: skip
    targets = (None, ("linear",), ("attention", "up"))
    merges = True

    @staticmethod
    def parameters(method: DeLoRA, sites: Sequence[Site]) -> int:
        return sum(method.rank * (s.in_features + s.out_features) + 1 for s in sites)


class TestFourierFT(MethodConformance):
    method = FourierFT
    configurations = st.builds(
        FourierFT, n_frequency=st.integers(1, 60), scaling=st.just(150.0), init=st.just("zeros"),
        seed=st.integers(0, 3),
    )  # fmt: skip
    targets = (None, ("linear",), ("attention", "up"))
    merges = True

    @staticmethod
    def parameters(method: FourierFT, sites: Sequence[Site]) -> int:
        return method.n_frequency * len(sites)


class TestFourierFTFromNoise(TestFourierFT):
    targets = (("query", "value"), ("down",))
    configurations = st.builds(
        FourierFT, n_frequency=st.sampled_from([2, 40]), scaling=st.just(5.0), init=st.just("normal")
    )


class TestWaveFT(MethodConformance):
    method = WaveFT
    configurations = st.builds(
        WaveFT, n_frequency=st.integers(3, 60), scaling=st.just(25.0), use_idwt=st.booleans(),
        wavelet=st.sampled_from(["db1", "db3", "sym4"]), seed=st.integers(0, 3),
    )  # fmt: skip
    targets = (None, ("linear",), ("attention", "up"))
    merges = True

    @staticmethod
    def parameters(method: WaveFT, sites: Sequence[Site]) -> int:
        return sum(method.counts(sites))


class TestWaveFTInProportion(TestWaveFT):
    targets = (("query", "value"), ("linear",))
    configurations = st.builds(
        WaveFT, n_frequency=st.sampled_from([3, 40]), scaling=st.just(25.0), proportional=st.just(True),
        init=st.sampled_from(["zeros", "normal"]),
    )  # fmt: skip


class TestRandLoRA(MethodConformance):
    method = RandLoRA
    configurations = st.builds(
        RandLoRA, rank=st.integers(1, 5), alpha=st.sampled_from([1.0, 20.0]), dropout=DROPOUT,
        bases=st.sampled_from(["uniform", "sparse", "very_sparse"]), key=st.integers(0, 3),
        save_projection=st.booleans(),
    )  # fmt: skip
    targets = (None, ("linear",), ("attention", "up"))
    merges = True

    @staticmethod
    def parameters(method: RandLoRA, sites: Sequence[Site]) -> int:
        smaller = [min(s.in_features, s.out_features) for s in sites]
        return sum(-(-d // method.rank) * (method.rank + d) for d in smaller)


class TestVBLoRA(MethodConformance):
    method = VBLoRA
    configurations = st.builds(
        VBLoRA, rank=st.integers(1, 4), num_vectors=st.integers(4, 9), vector_length=st.just(1),
        top_k=st.integers(1, 3), bound=st.sampled_from([0.02, 0.2]), dropout=DROPOUT,
    )  # fmt: skip
    targets = (None, ("attention",), ("up", "down"))
    merges = True

    @staticmethod
    def parameters(method: VBLoRA, sites: Sequence[Site]) -> int:
        h, b = method.num_vectors, method.vector_length
        return h * b + sum(h * method.rank * (s.in_features + s.out_features) // b for s in sites)
