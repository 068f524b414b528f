"""LoRA and DoRA for inlay, and where their factors may start."""

from inlay_lora.dora import DoRA
from inlay_lora.eva import EVA
from inlay_lora.lora import LoRA
from inlay_lora.start import Start

__all__ = ["EVA", "DoRA", "LoRA", "Start"]
