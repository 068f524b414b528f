"""The conformance kit: numbered rules that every method keeps, as properties over tiny real models.

class TestLoRA(MethodConformance):
    method = LoRA
    configurations = st.builds(LoRA, rank=st.integers(1, 4))
    merges = True

    @staticmethod
    def parameters(method, sites):
        return sum(method.rank * (s.in_features + s.out_features) for s in sites)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.testing.cases import Case, Joined, Member
    from inlay.testing.conformance import MethodConformance
    from inlay.testing.rule import RULES, Rule, RuleBroken
    from inlay.testing.snapshots import differences, snapshot

_HOMES = {
    "Case": "cases", "Joined": "cases", "Member": "cases", "RULES": "rules",
    "MethodConformance": "conformance",
    "Rule": "rule", "RuleBroken": "rule", "differences": "snapshots", "snapshot": "snapshots",
}  # fmt: skip

__all__ = [
    "RULES",
    "Case",
    "Joined",
    "Member",
    "MethodConformance",
    "Rule",
    "RuleBroken",
    "differences",
    "snapshot",
]


def __getattr__(name: str) -> Any:
    """Import on first use: tiny models alone need neither pytest nor hypothesis."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
