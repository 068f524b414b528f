"""Prefix tuning and P-tuning v2 for inlay."""

from inlay_prefix.folding import fold
from inlay_prefix.p_tuning_v2 import PTuningV2
from inlay_prefix.prefix_tuning import PrefixTuning

__all__ = ["PTuningV2", "PrefixTuning", "fold"]
