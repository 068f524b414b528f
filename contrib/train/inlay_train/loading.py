"""The model and tokenizer of a run, with a head drawn from its seed, and a finished run's read again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay import InlayError
from inlay_train import base
from inlay_train.quantised import FewBits, cast_biases


def tokenizer(folder: Path) -> Any:
    """Return the folder's tokenizer; one without a token for padding pads with its end token."""
    base.quiet()
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the files provoke
        raise InlayError(
            "the model's tokenizer cannot be read",
            saw=f"{folder}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
            do="name a folder with the model's tokenizer files (tokenizer.json) beside its config.json",
        ) from error
    if found.pad_token_id is None:
        found.pad_token = found.eos_token
    if found.pad_token_id is None:
        raise InlayError(
            "the tokenizer has no token to pad a batch with",
            saw=f"{folder} names neither a pad_token nor an eos_token",
            do='add one to its tokenizer_config.json, such as "pad_token": "<pad>"',
        )
    return found


def model(
    folder: Path,
    kind: Any,
    *,
    seed: int,
    settings: dict[str, Any],
    dtype: str = "float32",
    few_bits: FewBits | None = None,
    heads: Sequence[str] = (),
) -> nn.Module:
    """Return the model with its weights, quantised unless they are; a head they lack is drawn from `seed`."""
    config = base.configuration(folder, **settings)
    how = {} if few_bits is None else {"quantization_config": few_bits.configuration(heads)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made: nn.Module = kind.from_pretrained(
                folder, config=config, dtype=getattr(torch, dtype), local_files_only=True, **how
            )
        except Exception as error:  # transformers raises whatever the files provoke
            raise InlayError(
                "the model's weights cannot be loaded",
                saw=f"{folder}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                do="check that its files are whole and fit its config.json",
            ) from error
    cast_biases(made)
    return made
