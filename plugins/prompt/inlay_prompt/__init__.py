"""Prompt tuning and P-tuning for inlay."""

from inlay_prompt.p_tuning import PTuning
from inlay_prompt.prompt_tuning import PromptTuning

__all__ = ["PTuning", "PromptTuning"]
