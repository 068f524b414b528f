"""Running a decoder over a given text: in one call, or chunk by chunk through a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.testing.models import VOCABULARY


def tokens(rows: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    """Return token ids that are not special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def arguments(model: Any, ids: Tensor) -> dict[str, Any]:
    """Return what a call over `ids` takes: an encoder-decoder reads a text of its own besides."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    encoded = model.get_encoder()(input_ids=tokens(ids.shape[0], 6, seed=9))
    return {"encoder_outputs": encoded, "decoder_input_ids": ids}


@torch.no_grad()
def whole(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits of `ids` from one call."""
    logits: Tensor = model(**arguments(model, ids), use_cache=False).logits
    return logits


@torch.no_grad()
def stepwise(model: nn.Module, ids: Tensor, cache: Any, chunks: tuple[int, ...]) -> Tensor:
    """Return the logits of `ids` fed in `chunks` through `cache` (None: the model's own)."""
    given, found = arguments(model, ids), []
    name = next(k for k in given if k.endswith("input_ids"))
    for chunk in torch.split(ids, list(chunks), dim=1):
        out = model(**{**given, name: chunk}, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)
