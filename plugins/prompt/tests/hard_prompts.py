"""What the tests here compare with: the same model without inlay, reading real words in front of its text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.stack import need_state
from inlay.testing.models import VOCABULARY, build

WORDS = torch.tensor([11, 7, 29, 50])
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "max_new_tokens": 6}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "initializer_range": 0.2}  # fmt: skip


def seeded(make: Callable[[], nn.Module], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model in evaluation mode whose weights are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(dtype).eval()


def lively(family: str, **changes: Any) -> nn.Module:
    """Return a tiny model whose layers act."""
    return build(family, **({} if family == "t5" else {"initializer_range": 0.2}), **changes)


def rows_of(model: nn.Module, name: str = "default") -> nn.Parameter:
    """Return the rows P of the one prompt attached as `name`."""
    for placed in need_state(model).find(name):
        for _, delta in placed.adapter.placed:
            if isinstance(getattr(delta, "rows", None), nn.Parameter):
                return delta.rows
    raise AssertionError(f"no prompt is called {name}")


def padded(lengths: list[int], *, left: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Return a batch of rows of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(max(lengths) - length, None) if left else slice(0, length)
        ids[row, where] = torch.randint(3, VOCABULARY - 1, (length,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def with_words(batch: dict[str, Tensor], words: Tensor = WORDS) -> dict[str, Tensor]:
    """Return the batch with real words in front of each row's own tokens, wherever its padding is."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    joined = torch.zeros(ids.shape[0], ids.shape[1] + len(words), dtype=torch.long)
    seen = torch.cat([torch.ones(ids.shape[0], len(words), dtype=torch.long), mask], 1)
    for row in range(len(ids)):
        first = int(mask[row].argmax())
        joined[row] = torch.cat([ids[row, :first], words, ids[row, first:]])
        seen[row] = torch.cat([mask[row, :first], torch.ones_like(words), mask[row, first:]])
    return {"input_ids": joined, "attention_mask": seen}


def positions(batch: dict[str, Tensor]) -> Tensor:
    """Return the positions of each row's tokens, as `generate` counts them."""
    return (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)


def wake(model: nn.Module) -> None:
    """Give what starts at zero in the kit's low-rank method other values, so that it acts."""
    generator = torch.Generator().manual_seed(0)
    woken = [
        nn.init.normal_(p, std=0.3, generator=generator)
        for n, p in model.named_parameters()
        if n.endswith(".B")
    ]
    assert woken
