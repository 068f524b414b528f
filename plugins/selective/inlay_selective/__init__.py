"""BitFit and LN tuning for inlay."""

from inlay_selective.bitfit import BitFit
from inlay_selective.ln_tuning import LNTuning

__all__ = ["BitFit", "LNTuning"]
