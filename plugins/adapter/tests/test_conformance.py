"""The serial and parallel adapters keep the rules of docs/conformance.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from inlay.authoring import ModuleSite, Site
from inlay.testing import MethodConformance
from inlay_adapter import ParallelAdapter, SerialAdapter

SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "rank": st.integers(1, 5),
    "act": st.sampled_from(["relu", "gelu_tanh", "silu"]),
    "init": st.sampled_from(["lora", "houlsby", "bert"]),
    "scale": st.sampled_from([1.0, 4.0, "learned", "channel"]),
    "dropout": st.sampled_from([0.0, 0.1]),
}
SCALES = {"learned": lambda d: 1, "channel": lambda d: d}


def count(method: SerialAdapter | ParallelAdapter, sites: Sequence[Site]) -> int:
    """Return the sum of P(d, r) = 2dr + r + d and learned scales, and the norms that learn."""
    total, r = 0, method.rank
    for site in sites:
        d = site.out_features
        if isinstance(site, ModuleSite):
            total += d * (1 + site.has_bias)
        else:
            total += 2 * d * r + r + d + SCALES.get(method.scale, lambda d: 0)(d)
    return total


class TestHoulsby(MethodConformance):
    method = SerialAdapter
    configurations = st.builds(SerialAdapter, train_layernorms=st.none(), **SETTINGS)
    targets = (None, ("ffn", "norm"))
    by_layer = False
    parameters = staticmethod(count)


class TestPfeiffer(TestHoulsby):
    configurations = st.builds(SerialAdapter, placement=st.just("pfeiffer"), **SETTINGS)
    targets = (None, ("attention", "ffn"))
    by_layer = True


class TestParallelAdapter(MethodConformance):
    method = ParallelAdapter
    configurations = st.builds(ParallelAdapter, input=st.sampled_from(["normed", "residual"]), **SETTINGS)
    targets = (None, ("attention",), ("attention", "ffn"))
    parameters = staticmethod(count)
