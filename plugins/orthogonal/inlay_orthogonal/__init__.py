"""OFT, BOFT, HRA and RoAd for inlay."""

from inlay_orthogonal.boft import BOFT
from inlay_orthogonal.hra import HRA
from inlay_orthogonal.oft import OFT
from inlay_orthogonal.road import RoAd

__all__ = ["BOFT", "HRA", "OFT", "RoAd"]
