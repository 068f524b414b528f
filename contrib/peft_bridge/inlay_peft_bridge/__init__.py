"""Checkpoints of huggingface/peft, read into inlay and written from it. peft itself is not needed."""

from inlay_peft_bridge.converter import Converter, Place
from inlay_peft_bridge.export import to_peft
from inlay_peft_bridge.load import from_peft
from inlay_peft_bridge.report import Report
from inlay_peft_bridge.table import CONVERTERS

__all__ = ["CONVERTERS", "Converter", "Place", "Report", "from_peft", "to_peft"]
