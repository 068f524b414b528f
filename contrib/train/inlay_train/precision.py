"""Which dtypes go together in a run: refused before a weight is loaded."""

from __future__ import annotations

from typing import Any

import torch

from inlay import InlayError
from inlay_train.config import RunConfig


def adapter_dtype(config: RunConfig) -> torch.dtype | None:
    """Return what adapters are kept in; None: the base's dtype."""
    found: Any = None if config.adapter_dtype is None else getattr(torch, config.adapter_dtype)
    return found  # type: ignore[no-any-return]


def check_precision(config: RunConfig) -> None:
    """Raise if the run asks for dtypes that do not go together."""
    own = config.adapter_dtype is not None or config.master_weights
    if config.method == "full" and own:
        raise InlayError(
            "where the whole model is trained there are no adapters to keep in another dtype",
            saw=f"--method full, adapter dtype {config.adapter_dtype}, masters {config.master_weights}",
            do="leave them out, or give --mixed-precision bf16 with --dtype float32",
        )
    if config.mixed_precision == "bf16" and config.dtype == "float16":
        raise InlayError(
            "torch mixes no bfloat16 into a float16 model",
            saw="--dtype float16 --mixed-precision bf16",
            do="load it with --dtype bfloat16 or float32",
        )
    if config.mixed_precision == "fp16":
        _check_scaled(config)


def _check_scaled(config: RunConfig) -> None:
    """Raise unless a scaled loss can be trained on: accelerate scales it on accelerators alone."""
    if not torch.accelerator.is_available():
        raise InlayError(
            "a loss is scaled on an accelerator only",
            saw="--mixed-precision fp16, and none here",
            do="give --mixed-precision bf16",
        )
    kept = config.adapter_dtype or config.dtype
    if kept == "float16" and not config.master_weights:
        raise InlayError(
            "a scaled loss needs gradients in float32",
            saw="--mixed-precision fp16 with parameters that learn in float16",
            do="give --adapter-dtype float32 or --master-weights; of a whole model, --dtype float32",
        )
