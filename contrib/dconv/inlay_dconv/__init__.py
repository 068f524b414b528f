"""Depthwise convolutions over the sequence for inlay."""

from inlay_dconv.dconv import DConv

__all__ = ["DConv"]
