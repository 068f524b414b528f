"""BitFit, LN tuning and FishMask for inlay."""

from inlay_selective.bitfit import BitFit
from inlay_selective.fishmask import FishMask
from inlay_selective.ln_tuning import LNTuning

__all__ = ["BitFit", "FishMask", "LNTuning"]
