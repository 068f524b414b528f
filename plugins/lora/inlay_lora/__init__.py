"""LoRA, DoRA and their descendants for inlay, and where their factors may start."""

from inlay_lora.corda import CorDA
from inlay_lora.dora import DoRA
from inlay_lora.drawn import Gaussian, Kaiming, Orthogonal
from inlay_lora.eva import EVA
from inlay_lora.laplace import Laplace, Predictive, laplace
from inlay_lora.loftq import LoftQ, alternate
from inlay_lora.lora import LoRA
from inlay_lora.lora_dropout import LoRADropout, ensemble
from inlay_lora.lora_fa import LoRAFA
from inlay_lora.lora_plus import LoRAPlus
from inlay_lora.loraga import LoRAGA
from inlay_lora.moslora import MoSLoRA
from inlay_lora.olora import OLoRA
from inlay_lora.periodic_lora import PeriodicLoRA
from inlay_lora.pissa import PiSSA
from inlay_lora.plain import plain
from inlay_lora.qa_lora import QALoRA
from inlay_lora.start import Start

__all__ = [
    "EVA", "CorDA", "DoRA", "Gaussian", "Kaiming", "Laplace", "LoRA", "LoRADropout", "LoRAFA", "LoRAGA",
    "LoRAPlus", "LoftQ", "MoSLoRA", "OLoRA", "Orthogonal", "PeriodicLoRA", "PiSSA", "Predictive", "QALoRA",
    "Start", "alternate", "ensemble", "laplace", "plain",
]  # fmt: skip
