"""The rehearsed methods keep the rules of docs/conformance.md, alone and among the kit's neighbours.

Left out: adapter_fusion, which needs others attached first, and hyperformer, which needs tasks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from contract_checks import offered
from hypothesis import strategies as st
from rehearsal.loreft import LoReFT
from rehearsal.molora import MoLORA
from rehearsal.unipelt import UniPELT

from inlay.authoring import Site
from inlay.testing import MethodConformance
from inlay_adapter import SerialAdapter
from inlay_lora import LoRA
from inlay_prefix import PrefixTuning

pytestmark = pytest.mark.slow  # the methods' own tests run always
OWN = {"R16": "a method registered in this process is installed in no other"}


@pytest.fixture(autouse=True, scope="module")
def _offered() -> Iterator[None]:
    """Offer the methods here, and let a fresh interpreter find the rehearsal's folder."""
    with pytest.MonkeyPatch.context() as patch, offered(LoReFT, UniPELT, MoLORA):
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


class TestLoReFT(MethodConformance):
    method = LoReFT
    excused = {
        **OWN,
        "R28": "the prompt it edits is what the first call holds",
        "R32": "the rotation is computed in float32",
    }
    # Tied: nothing reads what an edit of the last token leaves behind BERT's last block.
    configurations = st.builds(LoReFT, rank=st.integers(1, 3), first=st.integers(1, 3))

    @staticmethod
    def parameters(method: LoReFT, sites: Sequence[Site]) -> int:
        return sum(2 * method.rank * s.out_features + method.rank for s in sites)


class TestUniPELT(MethodConformance):
    method = UniPELT
    excused = {**OWN, "R28": "its gates see the text so far, of which a call through the cache holds a part"}
    configurations = st.builds(
        UniPELT,
        lora=st.just(LoRA(rank=2, alpha=2)),
        adapter=st.sampled_from([None, SerialAdapter(placement="pfeiffer", rank=3)]),
        prefix=st.sampled_from([None, PrefixTuning(length=2, reparam=False)]),
    )

    @staticmethod
    def parameters(method: UniPELT, sites: Sequence[Any]) -> int:
        total = 0
        for s in sites:
            d, gate = s.out_features, s.in_features + 1
            inner = {"sublayer": 2 * 3 * d + 3 + d, "attention": 0}.get(s.kind, 2 * (s.in_features + d))
            total += gate + inner + (2 * 2 * s.kv_heads * s.head_dim if s.kind == "attention" else 0)
        return total


class TestMoLORA(MethodConformance):
    method = MoLORA
    excused = {**OWN, "R32": "its router computes in float32"}
    configurations = st.builds(MoLORA, expert=st.just(LoRA(rank=2)), experts=st.integers(2, 3))
    targets = (None, ("linear",))

    @staticmethod
    def parameters(method: MoLORA, sites: Sequence[Site]) -> int:
        each = [2 * (s.in_features + s.out_features) + s.in_features for s in sites]
        return method.experts * sum(each)
