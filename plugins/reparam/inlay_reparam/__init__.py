"""Reparameterisations of weights beyond LoRA, for inlay."""

from inlay_reparam.c3a import C3A
from inlay_reparam.folding import fold
from inlay_reparam.gralora import GraLoRA
from inlay_reparam.hiwi import HiWi
from inlay_reparam.intrinsic_said import IntrinsicSAID
from inlay_reparam.kadaptation import KAdaptation
from inlay_reparam.krona import KronA, KronAB, KronABRes
from inlay_reparam.loha import LoHa
from inlay_reparam.lokr import LoKr

__all__ = [
    "C3A", "GraLoRA", "HiWi", "IntrinsicSAID", "KAdaptation", "KronA", "KronAB", "KronABRes", "LoHa", "LoKr",
    "fold",
]  # fmt: skip
