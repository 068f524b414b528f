"""Extra keys beside masks that a caller makes: packed rows, four dimensions; beside a quantised cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay.testing.models import build
from inlay.testing.tools import distance, shake

STACK = "lora(rank=2) + prefix_tuning(length=3, hidden=8)"


def adapted(family: str = "llama", stack: str = STACK) -> Any:
    model = build(family)
    inlay.attach(model, stack)
    shake(model)
    return model


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "qwen"])
@torch.no_grad()
def test_documents_packed_into_one_row_give_what_each_gives_alone(family: str) -> None:
    """Positions that start anew tell transformers where a document ends; each sees the prefix."""
    model, first, second = adapted(family), tokens(4), tokens(3, seed=1)
    positions = torch.cat([torch.arange(4), torch.arange(3)])[None]
    packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :4], model(first).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 4:], model(second).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_mask_of_four_dimensions_is_the_users_own(family: str, implementation: str) -> None:
    """Hiding the first two tokens by such a mask is hiding them by one of two dimensions."""
    model, ids = adapted(family), tokens(6)
    model.set_attn_implementation(implementation)
    plain = torch.tensor([[0, 0, 1, 1, 1, 1]])
    seen = torch.ones(6, 6, dtype=torch.bool).tril() & plain.bool()
    floor = torch.finfo(torch.float32).min
    own = torch.zeros(1, 1, 6, 6).masked_fill(~seen, floor)
    positions = torch.arange(6)[None]
    wanted = model(ids, attention_mask=plain, position_ids=positions).logits[:, 2:]
    found = model(ids, attention_mask=own, position_ids=positions).logits[:, 2:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert distance(model(ids, position_ids=positions).logits[:, 2:], wanted) > 1e-3


@pytest.mark.parametrize("stack", [STACK, "prompt_tuning(length=2)"])
@torch.no_grad()
def test_a_quantised_cache_holds_the_users_own_tokens_only(stack: str) -> None:
    """In 8 bits the tokens are the same; the prefix is not in the cache, so it stays exact."""
    pytest.importorskip("hqq")
    model, ids = adapted(stack=stack), tokens(8)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **options)
    config = {"backend": "hqq", "nbits": 8, "q_group_size": 8, "residual_length": 2}
    found = model.generate(ids, **options, cache_implementation="quantized", cache_config=config)
    assert torch.equal(found, wanted)
