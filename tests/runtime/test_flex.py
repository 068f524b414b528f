"""flex_attention: extra keys in front of masks that are functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay.testing.models import build
from inlay.testing.tools import shake


def logits(model: Any, ids: Tensor, **given: Any) -> list[Tensor]:
    """Return what an adapter gives, and what rows of their own give, each with and without a mask."""
    found = []
    for options in ({}, given):
        found.append(model(ids, **options).logits)
        with inlay.route(model, ["fr", "de"]):
            found.append(model(ids, **options).logits)
    return found


@pytest.mark.slow  # a minute: flex_attention is compiled
@torch.no_grad()
def test_prefixes_give_what_they_give_with_sdpa() -> None:
    model: Any = build("llama")
    inlay.attach(model, "prefix_tuning(length=3, hidden=8)", "fr")
    inlay.attach(model, "p_tuning_v2(length=5) + prompt_tuning(length=2)", "de", activate=False)
    shake(model)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    wanted = logits(model, ids, attention_mask=mask)
    model.set_attn_implementation("flex_attention")
    for ours, theirs in zip(logits(model, ids, attention_mask=mask), wanted, strict=True):
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-5)
