"""Bottleneck adapters for inlay: serial (Houlsby, Pfeiffer) and parallel."""

from inlay_adapter.parallel import ParallelAdapter
from inlay_adapter.serial import SerialAdapter

__all__ = ["ParallelAdapter", "SerialAdapter"]
