"""flex_attention's masks, which are functions: extra keys in front of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_block_mask(mask: Any) -> bool:
    """Return whether a mask is flex_attention's."""
    return type(mask).__name__ == "BlockMask"


def widened_block_mask(mask: Any, visible: Tensor | None, width: int) -> Any:
    """Return a mask with `width` more keys in front, hidden from those rows `visible` (B, width) says."""
    from torch.nn.attention.flex_attention import create_block_mask

    own, (queries, keys) = mask.mask_mod, mask.seq_lengths
    front = torch.ones(1, width, dtype=torch.bool, device=mask.kv_num_blocks.device)
    front = front if visible is None else visible
    shared = front.shape[0] == 1

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ahead = front[row * 0 if shared else row, key.clamp(max=width - 1)]
        return torch.where(key < width, ahead, own(row, head, query, (key - width).clamp(min=0)))

    rows = max(mask.kv_num_blocks.shape[0], front.shape[0])
    return create_block_mask(
        seen, rows, None, queries, keys + width, device=front.device, BLOCK_SIZE=mask.BLOCK_SIZE
    )  # type: ignore[no-untyped-call]
