"""AdaLoRA and DyLoRA for inlay."""

from inlay_lora_rank.adalora import AdaLoRA
from inlay_lora_rank.dylora import DyLoRA, set_rank

__all__ = ["AdaLoRA", "DyLoRA", "set_rank"]
