"""Attention sites: extra keys and values, put in where the model calls its attention function.

A module that carries attention deltas gets a shallow copy of its config naming `inlay`, a function
registered in transformers' `AttentionInterface`. It extends keys, values and mask, then calls what
the model's own config names at that moment. The model's config and mask building stay untouched,
and nothing enters the cache.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.blockmask import is_block_mask, widened_block_mask
from inlay.context import At, Slot
from inlay.delta import Delta, KeyValues
from inlay.errors import AttachError, StateError
from inlay.hosts import check_own_forward
from inlay.ports import Port
from inlay.sites import AttentionSite

NAME = "inlay"
ADDED = ("eager", "flex_attention")  # implementations that add a mask to the scores


class AttentionPort(Port):
    """The port of an attention module: entering makes its config name our function."""

    def __init__(self, slot: Slot, site: AttentionSite) -> None:
        super().__init__(slot, site.name, site.module)
        self.site = site
        self.config: Any = getattr(site.module, "config", None)  # an architecture without is refused

    def check(self) -> None:
        check_can_enter(self.site)

    def enter(self) -> None:
        register()
        config = copy.copy(self.config)
        config._attn_implementation_internal = NAME
        self.module.__dict__.update(_inlay_attention=self, config=config)

    def leave(self) -> None:
        self.module.__dict__["config"] = self.config
        self.module.__dict__.pop("_inlay_attention", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # a pickle may be the first of us that a process sees
        self.__dict__.update(state)


class Columns:
    """The members of one attention module: their keys and values side by side, in stack order.

    `virtual` tells of rows that are among the keys and queries already.
    """

    def __init__(self, members: Sequence[tuple[Delta, At]], virtual: Any = None) -> None:
        self.members, self.virtual = tuple(members), virtual

    def __call__(self, key: Tensor) -> list[KeyValues]:
        return [delta(at) for delta, at in self.members]


class PromptColumns:
    """Keys and values that a stack's virtual tokens left at one attention module in this call."""

    def __init__(self, slot: Slot, key: Hashable, name: str) -> None:
        self.slot, self.key, self.name = slot, key, name

    def __call__(self, at: At) -> KeyValues:
        prepared = self.slot.call.prepared[self.key]  # type: ignore[union-attr]
        return KeyValues(prepared[f"{self.name}/key"], prepared[f"{self.name}/value"])


class RoutedColumns:
    """The columns of every stack of the batch, each visible to its own rows only."""

    def __init__(
        self, programs: Sequence[Columns | None], slot: Slot, site: AttentionSite, virtual: Any = None
    ) -> None:
        self.programs, self.slot, self.site, self.virtual = tuple(programs), slot, site, virtual

    def __call__(self, key: Tensor) -> list[KeyValues]:
        call = self.slot.call
        assert call is not None
        rows = call.expanded_rows(key.shape[0], self.site.name)
        found: list[KeyValues] = []
        for stack, program in enumerate(self.programs):
            if program is None or stack not in rows:
                continue
            mine = torch.tensor([row == stack for row in rows], device=key.device)[:, None]
            for columns in program(key):
                width = columns.key.shape[2]
                visible = mine.expand(-1, width)
                if columns.visible is not None:
                    visible = visible & columns.visible
                found.append(columns._replace(visible=visible))
        return found


def register() -> None:
    """Register our function with transformers, once."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)


def check_can_enter(site: AttentionSite) -> None:
    """Raise if keys and values cannot be put in here."""
    from inlay.anatomy import uses_attention_interface

    check_own_forward(site.module, site.name)
    if not uses_attention_interface(site.module):
        raise AttachError(
            "this architecture does not call attention through transformers' attention interface",
            saw=f"{site.name} is a {type(site.module).__name__}",
            do="choose a method that acts on layers or sublayers (lora, serial_adapter, ia3, …)",
        )
    if getattr(site.module, "reorder_and_upcast_attn", False):
        raise AttachError(
            "this attention module computes its product outside the attention interface",
            saw=f"{site.name} has reorder_and_upcast_attn=True",
            do="build the model with reorder_and_upcast_attn=False",
        )


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run the model's own attention with the extra columns of the active adapters.

    query (B, H, T, D), key and value (B, H_kv, S, D), after rotation and after the cache.
    """
    port: AttentionPort = module._inlay_attention  # type: ignore[assignment]
    call = port.slot.call
    program = port.program if call is None else call.programs[port.index]
    own = implementation(module, port.config._attn_implementation)
    if call is not None and call.recording is not None:
        _record(call.recording, port.site.name, key, value)
    columns = [] if program is None else program(key)
    rows = 0 if program is None or program.virtual is None else max(program.virtual.lengths())
    if rows:
        attention_mask = _with_rows(module, query, attention_mask, kwargs, program.virtual)
    if not columns and not rows:
        result: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, **kwargs)
        return result
    if kwargs.get("cache") is not None:
        raise StateError(
            "a paged cache would keep an adapter's extra keys and values as tokens",
            saw=f"continuous batching with {port.site.name} adapted",
            do="use model.generate without continuous batching",
        )
    if attention_mask is None and "flash" in port.config._attn_implementation and _is_packed(kwargs):
        raise StateError(
            "flash attention reads packed texts by their lengths, in which extra keys have no place",
            saw=f"texts packed in one row, at {port.site.name}",
            do="model.set_attn_implementation('sdpa'), or batches with one text in a row",
        )
    width, mask, kwargs = widened(module, query, key, attention_mask, columns, kwargs)
    key = torch.cat([*(_fitted(c.key, key) for c in columns), key], dim=2)
    value = torch.cat([*(_fitted(c.value, value) for c in columns), value], dim=2)
    output, weights = own(module, query, key, value, mask, **kwargs)
    return output, None if weights is None else weights[:, :, rows:, width + rows :]


def _is_packed(kwargs: dict[str, Any]) -> bool:
    """Return whether a row holds several texts: by their lengths, or by positions that start anew."""
    positions = kwargs.get("position_ids")
    restarts = positions is not None and bool((positions.diff(dim=-1) < 1).any())
    return restarts or kwargs.get("cu_seq_lens_k") is not None


def _record(found: dict[str, tuple[Tensor, Tensor]], name: str, key: Tensor, value: Tensor) -> None:
    if name in found:
        raise StateError(
            "virtual tokens cannot stand in front of this attention",
            saw=f"{name} calls the attention function more than once",
            do="use a method that acts on layers",
        )
    found[name] = (key, value)


def implementation(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return the attention function a config's `name` means for this module's file."""
    source = sys.modules[type(module).__module__]
    found: Callable[..., Any] = source.ALL_ATTENTION_FUNCTIONS.get_interface(
        name, source.eager_attention_forward
    )
    return found


def widened(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, columns: list[KeyValues], kwargs: dict[str, Any]
) -> tuple[int, Any, dict[str, Any]]:
    """Return (extra width, mask, kwargs) for keys with the columns in front."""
    if not columns:
        return 0, mask, kwargs
    width = sum(c.key.shape[2] for c in columns)
    visible = _visible(columns, key.shape[0], key.device)
    if kwargs.get("position_bias") is not None:
        kwargs = {**kwargs, "position_bias": nn.functional.pad(kwargs["position_bias"], (width, 0))}
    if mask is None:
        mask = _missing_mask(module, query, key, kwargs, visible is not None)
        if mask is None:
            return width, None, kwargs
    if is_block_mask(mask):
        return width, widened_block_mask(mask, visible, width), kwargs
    return width, widened_mask(mask, visible, width, key.shape[0]), kwargs


def _missing_mask(
    module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any], needed: bool
) -> Tensor | None:
    """Return the mask a caller left out because the kernel would make it: top-left causal, or all visible."""
    length = query.shape[2]
    if length > 1 and _is_causal(module, kwargs):
        seen = torch.ones(length, key.shape[2], dtype=torch.bool, device=key.device).tril()
    elif needed:
        seen = torch.ones(length, key.shape[2], dtype=torch.bool, device=key.device)
    else:
        return None
    return _as_mask(module, query, seen)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _as_mask(module: nn.Module, query: Tensor, seen: Tensor) -> Tensor:
    """Return which keys each query sees (T, S) as the mask the model's own implementation takes."""
    port: AttentionPort = module._inlay_attention  # type: ignore[assignment]
    if port.config._attn_implementation not in ADDED:
        return seen[None, None]
    floor = torch.finfo(query.dtype).min
    return torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, floor)[None, None]


def _with_rows(module: nn.Module, query: Tensor, mask: Any, kwargs: dict[str, Any], virtual: Any) -> Any:
    """Return a mask over tokens with virtual rows in front, among keys and queries.

    Tokens see the rows of their own sample. The rows see all that some token sees; under a causal
    mask, those rows before them alone.
    """
    width = max(virtual.lengths())
    visible: Tensor | None = virtual.visible(query.shape[0], query.device)
    causal = _is_causal(module, kwargs)
    if mask is None and visible is None:
        return None
    if mask is None:
        seen = torch.ones([query.shape[2] - width] * 2, dtype=torch.bool, device=query.device)
        mask = _as_mask(module, query, seen.tril() if causal else seen)
    mask = widened_mask(mask, visible, width, query.shape[0])
    if mask.dim() == 2 or (mask.shape[2] == 1 and not causal):
        return mask
    if not causal:
        top = mask.any(2, keepdim=True) if mask.dtype == torch.bool else mask.amax(2, keepdim=True)
        return torch.cat([top.expand(-1, -1, width, -1), mask], dim=2)
    own = torch.ones(width, mask.shape[3], dtype=torch.bool, device=mask.device).tril()[None, None]
    if visible is not None:  # a hidden row sees itself: attention to nothing is not a number
        eye = torch.eye(width, mask.shape[3], dtype=torch.bool, device=mask.device)
        seen = nn.functional.pad(visible, (0, mask.shape[3] - width))[:, None, None]
        own = (own & seen) | eye
    if mask.dtype != torch.bool:
        own = torch.zeros_like(own, dtype=mask.dtype).masked_fill(~own, torch.finfo(mask.dtype).min)
    return torch.cat([own.expand(*mask.shape[:2], -1, -1), mask], dim=2)


def widened_mask(mask: Any, visible: Tensor | None, width: int, batch: int) -> Tensor:
    """Return a mask with `width` more columns in front, hidden from those rows `visible` (B, width) says."""
    if not isinstance(mask, Tensor):
        raise StateError(
            "this kind of attention mask cannot be widened for extra keys",
            saw=f"a {type(mask).__name__}",
            do="model.set_attn_implementation('sdpa') or 'eager'",
        )
    if mask.dim() == 2:
        front = mask.new_ones(mask.shape[0], width) if visible is None else visible.to(mask.dtype)
        return torch.cat([front, mask], dim=1)
    if visible is not None:
        mask = mask.expand(batch, -1, -1, -1)
    shape = (*mask.shape[:3], width)
    seen = mask.new_ones(shape, dtype=torch.bool) if visible is None else visible[:, None, None].expand(shape)
    if mask.dtype != torch.bool:
        seen = mask.new_zeros(shape).masked_fill(~seen, torch.finfo(mask.dtype).min)
    return torch.cat([seen, mask], dim=-1)


def _visible(columns: list[KeyValues], batch: int, device: torch.device) -> Tensor | None:
    if all(c.visible is None for c in columns):
        return None
    parts = [
        torch.ones(batch, c.key.shape[2], dtype=torch.bool, device=device) if c.visible is None else c.visible
        for c in columns
    ]
    return torch.cat([part.expand(batch, -1) for part in parts], dim=1)


def _fitted(extra: Tensor, like: Tensor) -> Tensor:
    extra = extra if extra.shape[0] == like.shape[0] else extra.expand(like.shape[0], -1, -1, -1)
    return extra.to(like)  # the dtype, and under device_map the device, of this layer
