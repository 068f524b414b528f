"""Sites: resolved places in one model where a delta can act."""

from inlay.sites.site import (
    AttentionSite,
    BlockSite,
    ModuleSite,
    SequenceSite,
    Site,
    SublayerSite,
    Tap,
)
from inlay.sites.slice import Slice

__all__ = [
    "AttentionSite",
    "BlockSite",
    "ModuleSite",
    "SequenceSite",
    "Site",
    "Slice",
    "SublayerSite",
    "Tap",
]
