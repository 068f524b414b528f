"""Reparameterisations of weights beyond LoRA, for inlay."""

from inlay_reparam.delora import DeLoRA
from inlay_reparam.fourierft import FourierFT
from inlay_reparam.miss import MiSS
from inlay_reparam.randlora import RandLoRA
from inlay_reparam.vblora import VBLoRA
from inlay_reparam.vera import VeRA
from inlay_reparam.waveft import WaveFT

__all__ = ["DeLoRA", "FourierFT", "MiSS", "RandLoRA", "VBLoRA", "VeRA", "WaveFT"]
