"""Reparameterisations of weights beyond LoRA, for inlay."""

from inlay_reparam.c3a import C3A
from inlay_reparam.delora import DeLoRA
from inlay_reparam.folding import fold
from inlay_reparam.fourierft import FourierFT
from inlay_reparam.gralora import GraLoRA
from inlay_reparam.hiwi import HiWi
from inlay_reparam.intrinsic_said import IntrinsicSAID
from inlay_reparam.kadaptation import KAdaptation
from inlay_reparam.krona import KronA, KronAB, KronABRes
from inlay_reparam.loha import LoHa
from inlay_reparam.lokr import LoKr
from inlay_reparam.miss import MiSS
from inlay_reparam.randlora import RandLoRA
from inlay_reparam.vblora import VBLoRA
from inlay_reparam.vera import VeRA
from inlay_reparam.waveft import WaveFT

__all__ = [
    "C3A", "DeLoRA", "FourierFT", "GraLoRA", "HiWi", "IntrinsicSAID", "KAdaptation", "KronA", "KronAB",
    "KronABRes", "LoHa", "LoKr", "MiSS", "RandLoRA", "VBLoRA", "VeRA", "WaveFT", "fold",
]  # fmt: skip
