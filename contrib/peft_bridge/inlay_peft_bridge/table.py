"""The methods that both libraries know. A new one is a `Converter` in its family's file and its name here."""

from __future__ import annotations

from inlay_peft_bridge.converter import Config, Converter
from inlay_peft_bridge.lora import DORA, LORA
from inlay_peft_bridge.orthogonal import BOFT, HRA, OFT, ROAD
from inlay_peft_bridge.reparam import (
    C3A,
    DELORA,
    FOURIERFT,
    GRALORA,
    LOHA,
    LOKR,
    MISS,
    RANDLORA,
    VBLORA,
    VERA,
    WAVEFT,
)
from inlay_peft_bridge.report import refused
from inlay_peft_bridge.scaling import IA3

CONVERTERS: tuple[Converter, ...] = (
    LORA, DORA, IA3, OFT, BOFT, HRA, ROAD, LOHA, LOKR, FOURIERFT, WAVEFT, C3A, GRALORA, MISS,
    VERA, RANDLORA, VBLORA, DELORA,
)  # fmt: skip


def for_config(config: Config) -> Converter:
    """Return the converter of a configuration of peft's."""
    found = next((c for c in CONVERTERS if c.applies(config)), None)
    if found is None:
        raise refused(
            "peft adapters of this kind cannot be converted",
            saw=f"peft_type={config['peft_type']!a}",
            do=f"these can: {', '.join(sorted({c.peft_type for c in CONVERTERS}))}",
        )
    return found


def for_method(method: str) -> Converter:
    """Return the converter of a method of inlay's."""
    found = next((c for c in CONVERTERS if c.method == method), None)
    if found is None:
        raise refused(
            "peft has no counterpart of this method that could be written exactly",
            saw=ascii(method),
            do=f"these can be written: {', '.join(c.method for c in CONVERTERS)}; or merge it: inlay merge",
        )
    return found
