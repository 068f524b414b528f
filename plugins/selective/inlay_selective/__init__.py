"""BitFit, LN tuning, FishMask and LT-SFT for inlay."""

from inlay_selective.bitfit import BitFit
from inlay_selective.fishmask import FishMask
from inlay_selective.ln_tuning import LNTuning
from inlay_selective.lt_sft import LTSFT

__all__ = ["LTSFT", "BitFit", "FishMask", "LNTuning"]
