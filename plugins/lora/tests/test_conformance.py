"""LoRA, DoRA and their descendants, at random starts and at EVA's, keep the rules of docs/conformance.md."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from inlay.authoring import Site
from inlay.testing import MethodConformance
from inlay_lora import (
    EVA,
    CorDA,
    DoRA,
    Gaussian,
    Kaiming,
    LoRA,
    LoRADropout,
    LoRAFA,
    LoRAGA,
    LoRAPlus,
    MoSLoRA,
    OLoRA,
    Orthogonal,
    PeriodicLoRA,
    PiSSA,
    QALoRA,
)

SETTINGS = {
    "rank": st.integers(1, 4),
    "alpha": st.sampled_from([1.0, 8.0]),
    "dropout": st.sampled_from([0.0, 0.1]),
    "scaling": st.sampled_from(["standard", "rsqrt"]),
    "start": st.sampled_from([Kaiming(), Gaussian()]),
}


class TestLoRA(MethodConformance):
    method = LoRA
    configurations = st.builds(LoRA, **SETTINGS)
    targets = (None, ("linear",), ("attention", "up"))
    merges = True

    @staticmethod
    def parameters(method: LoRA, sites: Sequence[Site]) -> int:
        return sum(method.rank * (s.in_features + s.out_features) for s in sites)


class TestLoRAOnEmbeddings(TestLoRA):
    families = ("llama", "gpt2", "bert")
    targets = (("embedding",), ("embedding", "query"))
    by_layer = False

    @staticmethod
    def merges(method: LoRA, family: str) -> bool:
        return family != "gpt2"  # its table is tied to the head


EQUAL = st.builds(EVA, rho=st.just(1.0), tau=st.sampled_from([0.9, 0.99]), whiten=st.booleans())
KEPT = st.sampled_from([PiSSA(), PiSSA(niter=2), OLoRA()])
SHARED_OUT = st.builds(EVA, rho=st.sampled_from([1.5, 2.0]))


class TestLoRAFromEVA(TestLoRA):
    """Σ r_l = L·r: on layers of one size, as many parameters as without it, and as a dry run says."""

    configurations = st.builds(LoRA, **SETTINGS | {"start": EQUAL | SHARED_OUT})
    targets = (("query",), ("up",))


class TestLoRAFromItsWeight(TestLoRA):
    """The start is kept beside the factors: the change is exactly zero at first."""

    configurations = st.builds(LoRA, **SETTINGS | {"start": KEPT})
    targets = (None, ("linear",))


class TestLoRAFromWeightAndData(TestLoRA):
    configurations = st.builds(
        LoRA, **SETTINGS | {"start": st.sampled_from([CorDA(), CorDA(mode="kpm"), LoRAGA(gamma=64.0)])}
    )
    targets = (None, ("linear",))


class TestLoRAOfOwnBiases(TestLoRA):
    configurations = st.builds(LoRA, **SETTINGS, bias=st.just("own"))
    targets = (None,)
    adds_biases = True

    @staticmethod
    def parameters(method: LoRA, sites: Sequence[Site]) -> int:
        return TestLoRA.parameters(method, sites) + sum(s.out_features for s in sites)


class TestLoRAOfTheLayersBiases(TestLoRAOfOwnBiases):
    families = ("gpt2", "bert", "vit")
    configurations = st.builds(LoRA, **SETTINGS, bias=st.just("layer"))
    adds_biases = False


class TestLoRAByRole(TestLoRA):
    configurations = st.builds(
        LoRA,
        **SETTINGS
        | {
            "rank": st.sampled_from([{"query": 3, "default": 2}, {"attention": 1, "up": 4}]),
            "alpha": st.sampled_from([{"query": 2.0, "default": 8}, 4.0]),
        },
    )
    targets = (("query", "up"),)
    excused = {"R37": "a plain module has no roles"}

    @staticmethod
    def parameters(method: LoRA, sites: Sequence[Site]) -> int:
        assert isinstance(method.rank, dict)
        other = method.rank.get("default", 1)
        return sum(method.rank.get(s.role, other) * (s.in_features + s.out_features) for s in sites)


class TestLoRAOrthogonal(TestLoRA):
    configurations = st.builds(
        LoRA, **SETTINGS | {"rank": st.sampled_from([2, 4]), "start": st.just(Orthogonal())}
    )
    targets = (None,)
    start_tolerance = 1e-5


class TestDoRA(MethodConformance):
    method = DoRA
    configurations = st.builds(DoRA, **SETTINGS)
    targets = (None, ("query", "value"), ("ffn",))
    start_tolerance = 1e-5
    merges = True
    excused = {"R32": "the norm is a constant to the gradient, as the paper has it (section 4.3)"}

    @staticmethod
    def parameters(method: DoRA, sites: Sequence[Site]) -> int:
        return sum(method.rank * (s.in_features + s.out_features) + s.out_features for s in sites)


class TestDoRAFromEVA(TestDoRA):
    """Equal ranks: a layer that loses its adapter loses its magnitude as well."""

    configurations = st.builds(DoRA, **SETTINGS | {"start": EQUAL})
    targets = (("query",), ("up",))


class TestDoRAFromItsWeight(TestDoRA):
    configurations = st.builds(DoRA, **SETTINGS | {"start": KEPT})
    targets = (None,)


class TestMoSLoRA(MethodConformance):
    method = MoSLoRA
    configurations = st.builds(MoSLoRA, **SETTINGS, mixer=st.sampled_from(["kaiming", "orthogonal", "eye"]))
    targets = (None, ("linear",))
    merges = True

    @staticmethod
    def parameters(method: MoSLoRA, sites: Sequence[Site]) -> int:
        return sum(method.rank * (s.in_features + s.out_features + method.rank) for s in sites)


class TestLoRAPlus(TestLoRA):
    method = LoRAPlus
    configurations = st.builds(LoRAPlus, **SETTINGS, ratio=st.sampled_from([1.0, 16.0]))


class TestLoRAPlusOnEmbeddings(TestLoRAOnEmbeddings):
    method = LoRAPlus
    configurations = st.builds(LoRAPlus, **SETTINGS, embedding_lr=st.just(1e-3))


FROZEN = {**SETTINGS, "key": st.integers(0, 3)}


class TestLoRAFA(MethodConformance):
    method = LoRAFA
    configurations = st.builds(LoRAFA, **FROZEN, corrected=st.just(False))
    targets = (None, ("linear",))
    merges = True

    @staticmethod
    def parameters(method: LoRAFA, sites: Sequence[Site]) -> int:
        return sum(method.rank * s.out_features for s in sites)


class TestLoRAFACorrected(TestLoRAFA):
    configurations = st.builds(LoRAFA, **FROZEN)
    excused = {"R32": "the gradient of B is replaced by what approximates the weight's best"}


class TestLoRAFAFromEVA(TestLoRAFA):
    """Equal ranks; its A is in the file."""

    configurations = st.builds(LoRAFA, **FROZEN | {"start": EQUAL}, corrected=st.just(False))
    targets = (("query",), ("up",))


HALVED = {**SETTINGS, "dropout": st.sampled_from([0.0, 0.5])}


class TestLoRADropout(TestLoRA):
    method = LoRADropout
    configurations = st.builds(LoRADropout, **HALVED, rescale=st.booleans())


class TestQALoRA(MethodConformance):
    method = QALoRA
    configurations = st.builds(QALoRA, **SETTINGS, group=st.sampled_from([1, 4, 16]))
    targets = (None, ("query", "value"))
    merges = True

    @staticmethod
    def parameters(method: QALoRA, sites: Sequence[Site]) -> int:
        return sum(method.rank * (s.in_features // method.group + s.out_features) for s in sites)


class TestPeriodicLoRA(TestLoRA):
    method = PeriodicLoRA
    configurations = st.builds(PeriodicLoRA, **SETTINGS, momentum=st.sampled_from([0.0, 0.5]))
