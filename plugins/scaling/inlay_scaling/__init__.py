"""(IA)^3 and SSF for inlay."""

from inlay_scaling.ia3 import IA3
from inlay_scaling.ssf import SSF

__all__ = ["IA3", "SSF"]
