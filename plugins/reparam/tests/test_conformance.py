"""The reparameterisations keep the rules of docs/conformance.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from inlay.authoring import Site
from inlay.authoring.sparse import distinct, places
from inlay.testing import MethodConformance
from inlay_reparam import (
    C3A,
    DeLoRA,
    FourierFT,
    GraLoRA,
    HiWi,
    IntrinsicSAID,
    KAdaptation,
    KronA,
    KronAB,
    KronABRes,
    LoHa,
    LoKr,
    MiSS,
    RandLoRA,
    VBLoRA,
    VeRA,
    WaveFT,
)
from inlay_reparam.kron import factorization

REBUILT: dict[str, st.SearchStrategy[Any]] = {
    "rank": st.integers(1, 4),
    "alpha": st.sampled_from([1.0, 8.0]),
    "rank_dropout": st.sampled_from([0.0, 0.1]),
    "module_dropout": st.sampled_from([0.0, 0.1]),
}
CHOSEN = (None, ("linear",), ("attention", "up"))


def kronecker(method: LoKr, site: Site) -> int:
    """Return l·m or r·(l + m), and k·n or r·(k + n)."""
    (l, k), (m, n) = (
        factorization(s, method.decompose_factor) for s in (site.out_features, site.in_features)
    )
    r = method.rank
    first = r * (l + m) if method.decompose_both and r < max(l, m) / 2 else l * m
    return first + (r * (k + n) if r < max(k, n) / 2 else k * n)


class TestLoKr(MethodConformance):
    method = LoKr
    configurations = st.builds(
        LoKr,
        **REBUILT,
        decompose_both=st.booleans(),
        decompose_factor=st.sampled_from([-1, 2, 4]),
        zero=st.sampled_from(["w1", "w2"]),
    )
    targets = CHOSEN
    merges = True

    @staticmethod
    def parameters(method: LoKr, sites: Sequence[Site]) -> int:
        return sum(kronecker(method, site) for site in sites)


class TestLoHa(MethodConformance):
    method = LoHa
    configurations = st.builds(LoHa, **REBUILT, init=st.sampled_from(["kaiming", "normal"]))
    targets = CHOSEN
    merges = True

    @staticmethod
    def parameters(method: LoHa, sites: Sequence[Site]) -> int:
        return sum(2 * method.rank * (s.in_features + s.out_features) for s in sites)


def patches(sites: Sequence[Site]) -> Iterator[tuple[int, int, int]]:
    """Yield (out, in, |kernel|) of convolutions."""
    for site in sites:
        rows, columns, *kernel = site.module.weight.shape  # type: ignore[union-attr]
        yield rows, columns, math.prod(kernel)


class TestLoKrOnConvolutions(TestLoKr):
    configurations = st.builds(LoKr, **{**REBUILT, "rank": st.integers(1, 3)}, effective_conv=st.booleans())
    families = ("vit",)
    targets = (("embedding",),)
    by_layer = False

    @staticmethod
    def parameters(method: LoKr, sites: Sequence[Site]) -> int:
        found, r = 0, method.rank
        for rows, columns, kernel in patches(sites):
            (l, k), (m, n) = factorization(rows), factorization(columns)
            low = r * (k + n) + r * r * kernel if method.effective_conv else r * (k + n * kernel)
            found += l * m + (low if r < max(k, n) / 2 else k * n * kernel)
        return found


class TestLoHaOnConvolutions(TestLoHa):
    configurations = st.builds(LoHa, **{**REBUILT, "rank": st.integers(1, 3)}, effective_conv=st.booleans())
    families = ("vit",)
    targets = (("embedding",),)
    by_layer = False

    @staticmethod
    def parameters(method: LoHa, sites: Sequence[Site]) -> int:
        found, r = 0, method.rank
        for rows, columns, kernel in patches(sites):
            size = rows + columns + r * kernel if method.effective_conv else rows + columns * kernel
            found += 2 * r * size
        return found


class TestC3A(MethodConformance):
    method = C3A
    configurations = st.builds(
        C3A, block_size=st.sampled_from([2, 4, 16]), init=st.sampled_from(["zeros", "xavier", "gaussian"])
    )
    targets = CHOSEN
    merges = True

    @staticmethod
    def parameters(method: C3A, sites: Sequence[Site]) -> int:
        assert method.block_size is not None
        return sum(s.in_features * s.out_features // method.block_size for s in sites)


class TestGraLoRA(MethodConformance):
    method = GraLoRA
    configurations = st.builds(
        GraLoRA,
        rank=st.sampled_from([4, 8]),
        alpha=st.sampled_from([4.0, 16.0]),
        k=st.sampled_from([1, 2, 4]),
        hybrid_rank=st.sampled_from([0, 2]),
        dropout=st.sampled_from([0.0, 0.1]),
    )
    targets = CHOSEN
    merges = True

    @staticmethod
    def parameters(method: GraLoRA, sites: Sequence[Site]) -> int:
        return sum((method.rank + method.hybrid_rank) * (s.in_features + s.out_features) for s in sites)


def of_shape(method: KronA | KronAB, sites: Sequence[Site]) -> int:
    """Return Σ a1·a2 + b1·b2."""
    found = 0
    for site in sites:
        rows, columns = site.out_features, site.in_features
        a1, a2 = method.shape or (factorization(rows)[1], factorization(columns)[0])
        found += a1 * a2 + rows // a1 * (columns // a2)
    return found


KRONECKER = {"shape": st.sampled_from([None, (4, 8), (2, 16)]), "scale": st.sampled_from([2.0, 16.0])}


class TestKronA(MethodConformance):
    method = KronA
    configurations = st.builds(KronA, **KRONECKER)
    targets = CHOSEN
    merges = True
    parameters = staticmethod(of_shape)


class TestKronAB(MethodConformance):
    method = KronAB
    configurations = st.builds(KronAB, **KRONECKER, bias=st.booleans())
    targets = (None, ("attention",))

    @staticmethod
    def parameters(method: KronAB, sites: Sequence[Site]) -> int:
        return of_shape(method, sites) + method.bias * sum(s.out_features for s in sites)


class TestKronABRes(TestKronAB):
    method = KronABRes
    configurations = st.builds(
        KronABRes, **KRONECKER, bias=st.booleans(), residual=st.sampled_from([0.0, 1.0])
    )

    @staticmethod
    def parameters(method: KronABRes, sites: Sequence[Site]) -> int:
        return TestKronAB.parameters(method, sites) + len(sites)


class TestKAdaptation(MethodConformance):
    """Dropout is on the change's entries, in training alone."""

    method = KAdaptation
    configurations = st.builds(
        KAdaptation,
        n=st.sampled_from([4, 8]),
        rank=st.integers(1, 2),
        scale=st.sampled_from([10.0, 160.0]),
        dropout=st.sampled_from([0.0, 0.5]),
    )
    targets = CHOSEN
    merges = True
    adds_biases = True

    @staticmethod
    def parameters(method: KAdaptation, sites: Sequence[Site]) -> int:
        roles = {s.role for s in sites}
        biases = {(s.side, s.cross, s.layer, s.out_features) for s in sites}
        fast = sum(method.rank * (s.in_features + s.out_features) for s in sites)
        return 2 * method.n**2 * len(roles) + fast + sum(size for *_, size in biases)


class TestHiWi(MethodConformance):
    """On weights: the biases of models that were never trained are 0, and refused."""

    method = HiWi
    configurations = st.builds(
        HiWi, target=st.just("weight"), rank=st.integers(1, 4), act=st.sampled_from(["relu", "gelu"])
    )
    targets = CHOSEN
    merges = True

    @staticmethod
    def parameters(method: HiWi, sites: Sequence[Site]) -> int:
        return sum(2 * method.rank * s.out_features for s in sites)


class TestIntrinsicSAID(MethodConformance):
    method = IntrinsicSAID
    configurations = st.sampled_from(
        [
            IntrinsicSAID(d=80),
            IntrinsicSAID(d=200, key=1),
            IntrinsicSAID(d=80, said=False),
            IntrinsicSAID(
                d=16, said=False, projection="dense"
            ),  # a matrix of D rows: no larger one is loaded
        ]
    )
    targets = (("linear", "norm"), ("query", "up"), ("embedding", "norm"))

    @staticmethod
    def parameters(method: IntrinsicSAID, sites: Sequence[Site]) -> int:
        assert distinct(places(sites))
        return method.d

    @staticmethod
    def merges(method: IntrinsicSAID, family: str) -> bool:
        tied = family in ("gpt2", "t5") and "embedding" in (
            method.targets or ()
        )  # to the head, to the other side
        return not tied or method.layers is not None


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
