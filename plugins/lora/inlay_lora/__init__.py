"""LoRA and DoRA for inlay, and where their factors may start."""

from inlay_lora.dora import DoRA
from inlay_lora.drawn import Gaussian, Kaiming, Orthogonal
from inlay_lora.eva import EVA
from inlay_lora.lora import LoRA
from inlay_lora.olora import OLoRA
from inlay_lora.pissa import PiSSA
from inlay_lora.start import Start

__all__ = ["EVA", "DoRA", "Gaussian", "Kaiming", "LoRA", "OLoRA", "Orthogonal", "PiSSA", "Start"]
