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

from inlay.context import At, Call, Slot
from inlay.delta import Delta, KeyValues
from inlay.errors import AttachError, StateError
from inlay.hosts import check_own_forward
from inlay.ports import Port
from inlay.sites import AttentionSite, SequenceSite

NAME = "inlay"


class AttentionPort(Port):
    """The port of an attention module: entering makes its config name our function."""

    def __init__(self, slot: Slot, site: AttentionSite) -> None:
        super().__init__(slot, site.name, site.module)
        self.site = site
        self.config: Any = site.module.config

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
    """The members of one attention module: their keys and values side by side, in stack order."""

    def __init__(self, members: Sequence[tuple[Delta, At]]) -> None:
        self.members = tuple(members)

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

    def __init__(self, programs: Sequence[Columns | None], slot: Slot, site: AttentionSite) -> None:
        self.programs, self.slot, self.site = tuple(programs), slot, site

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
        call.recording[port.site.name] = (key, value)
    columns = [] if program is None else program(key)
    if not columns:
        result: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, **kwargs)
        return result
    if kwargs.get("cache") is not None:
        raise StateError(
            "a paged cache would keep an adapter's extra keys and values as tokens",
            saw=f"continuous batching with {port.site.name} adapted",
            do="use model.generate without continuous batching",
        )
    width, mask, kwargs = widened(module, query, key, attention_mask, columns, kwargs)
    key = torch.cat([*(_fitted(c.key, key) for c in columns), key], dim=2)
    value = torch.cat([*(_fitted(c.value, value) for c in columns), value], dim=2)
    output, weights = own(module, query, key, value, mask, **kwargs)
    return output, None if weights is None else weights[..., width:]


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
    width = sum(c.key.shape[2] for c in columns)
    visible = _visible(columns, key.shape[0], key.device)
    if kwargs.get("position_bias") is not None:
        kwargs = {**kwargs, "position_bias": nn.functional.pad(kwargs["position_bias"], (width, 0))}
    if mask is None:
        mask = _missing_mask(module, query, key, kwargs, visible is not None)
        if mask is None:
            return width, None, kwargs
    if not isinstance(mask, Tensor):
        raise StateError(
            "this kind of attention mask cannot be widened for extra keys",
            saw=f"a {type(mask).__name__}",
            do="model.set_attn_implementation('sdpa') or 'eager'",
        )
    return width, _widened_mask(mask, visible, width, key.shape[0]), kwargs


def _missing_mask(
    module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any], needed: bool
) -> Tensor | None:
    """Return the mask a caller left out because the kernel would make it: top-left causal, or all visible."""
    length = query.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if length > 1 and causal:
        seen = torch.ones(length, key.shape[2], dtype=torch.bool, device=key.device).tril()
    elif needed:
        seen = torch.ones(length, key.shape[2], dtype=torch.bool, device=key.device)
    else:
        return None
    if module._inlay_attention.config._attn_implementation != "eager":  # type: ignore[union-attr]
        return seen[None, None]
    floor = torch.finfo(query.dtype).min
    return torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, floor)[None, None]


def _widened_mask(mask: Tensor, visible: Tensor | None, width: int, batch: int) -> Tensor:
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


def run_prompt(
    call: Call, alone: Call, site: SequenceSite, members: Sequence[tuple[Delta, At]]
) -> dict[str, Tensor]:
    """Evaluate a stack's virtual tokens once, batch 1, at positions −p…−1; return their keys and values.

    `alone` is a call in which only that stack is active. Exact for causal models: what the rows
    leave at each layer depends on nothing but themselves.
    """
    rows = torch.cat([delta(at) for delta, at in members])[None]
    alone.model, alone.recording, alone.prepared = call.model, {}, call.prepared
    slot, before = call.slot, call.slot.call
    slot.call = alone
    try:
        positions = torch.arange(-rows.shape[1], 0, device=rows.device)[None]
        site.module(inputs_embeds=rows.to(site.reference.dtype), position_ids=positions, use_cache=False)
    finally:
        slot.call = before
    recorded = alone.recording
    return {
        f"{name}/{part}": tensor
        for name, pair in recorded.items()
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
