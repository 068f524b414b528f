"""LoRA and DoRA for inlay."""

from inlay_lora.dora import DoRA
from inlay_lora.lora import LoRA

__all__ = ["DoRA", "LoRA"]
