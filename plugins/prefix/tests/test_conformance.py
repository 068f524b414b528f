"""Prefix tuning and P-tuning v2 keep the rules of docs/conformance.md."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from hypothesis import strategies as st

from inlay.authoring import AttentionSite
from inlay.testing import MethodConformance
from inlay_prefix import PrefixTuning, PTuningV2
from inlay_prefix.keyvalues import PrefixMethod

SETTINGS = {
    "length": st.integers(1, 4),
    "hidden": st.integers(2, 6),
    "dropout": st.sampled_from([0.0, 0.1]),
    "cross_prefix": st.booleans(),
    "encoder_prefix": st.booleans(),
}


def count(method: PrefixMethod, sites: Sequence[AttentionSite]) -> int:
    """Return p·2·L·H_kv·D, or p·d + (d + 1)·m + (m + 1)·2·L·H_kv·D for each generator."""
    p, m = method.length, method.hidden
    if not method.prepares:
        return sum(2 * p * s.kv_heads * s.head_dim for s in sites)
    total = 0
    for _, group in groupby(sorted(sites, key=lambda s: (s.side, s.cross)), key=lambda s: (s.side, s.cross)):
        members = list(group)
        d, width = members[0].features, sum(2 * s.kv_heads * s.head_dim for s in members)
        total += p * d + (d + 1) * m + (m + 1) * width
    return total


class TestPrefixTuning(MethodConformance):
    method = PrefixTuning
    configurations = st.builds(PrefixTuning, reparam=st.booleans(), **SETTINGS)
    parameters = staticmethod(count)


class TestPTuningV2(MethodConformance):
    method = PTuningV2
    configurations = st.builds(PTuningV2, prefix_projection=st.booleans(), **SETTINGS)
    parameters = staticmethod(count)
