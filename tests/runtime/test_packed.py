"""Several texts packed in one row, told apart by positions that start anew: each gets what it gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import StateError
from inlay.testing.models import build
from inlay.testing.tools import shake

pytest.importorskip("transformers")

LENGTHS = (4, 3, 5)
STACKS = [
    "lora(rank=2) + prefix_tuning(length=3, hidden=8)",
    "prompt_tuning(length=3)",
    "p_tuning_v2(length=2)",
]


def adapted(family: str, stack: str, kind: str) -> Any:
    model = build(family).eval()
    model.set_attn_implementation(kind)
    inlay.attach(model, stack)
    shake(model)
    return model


def packed() -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}


def logits(model: nn.Module, **batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**batch, use_cache=False).logits[0]


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_text_gets_what_it_gets_alone(family: str, stack: str, kind: str) -> None:
    model, batch = adapted(family, stack, kind), packed()
    found = logits(model, **batch).split(LENGTHS)
    alone = [logits(model, input_ids=ids[None]) for ids in batch["input_ids"][0].split(LENGTHS)]
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    with inlay.use(model):
        assert (logits(model, **batch) - torch.cat(found)).abs().max() > 1e-3


@pytest.mark.parametrize("told", ["positions", "lengths"])
def test_flash_attention_over_packed_texts_is_refused(told: str) -> None:
    """It would read the extra keys as the first text's; only the refusal can be tried without a GPU."""
    model, batch = adapted("llama", "prefix_tuning(length=3, hidden=8)", "sdpa"), packed()
    model.config._attn_implementation = "flash_attention_2"
    if told == "lengths":
        ends = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
        batch = {"input_ids": batch["input_ids"], "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    with pytest.raises(
        StateError, match=r"flash attention reads packed texts by their lengths(.|\n)*at .*self_attn"
    ) as caught:
        logits(model, **batch)
    assert "set_attn_implementation('sdpa')" in str(caught.value)
