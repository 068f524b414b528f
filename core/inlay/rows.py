"""Virtual tokens of a model: evaluated once per call, then keys and values, or rows among the tokens.

`Virtual` knows the rows of the stacks of a batch at one sequence site. Where they run through the
blocks, `Gate` lets them in and out, `attention` gives their columns and rows to each attention mask,
and `Inner` and `Reader` keep their traces to themselves. `Shifted` moves the tokens' own positions,
and `Turned` gives the rows theirs in rotary encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.anatomy.sequence import accepts
from inlay.attention import widened_mask
from inlay.context import At, Call, Slot, take_first
from inlay.delta import Delta
from inlay.errors import StateError
from inlay.ports import Entered
from inlay.programs import Overlay, shadow_of
from inlay.sites import SequenceSite

Base = Callable[..., Any]


class Virtual:
    """The virtual rows of a batch at one site: a key into `call.prepared` for each stack, None for no rows.

    Rows of a batch may have prompts of different lengths: shorter ones stand at the end, beside the
    tokens, and what is in front of them is hidden.
    """

    def __init__(self, slot: Slot, site: SequenceSite, keys: Sequence[Hashable | None]) -> None:
        self.slot, self.site, self.keys = slot, site, tuple(keys)

    def lengths(self) -> list[int]:
        """Return how many rows each stack has, in the call under way."""
        call = self.slot.call
        if call is None or call.model is None:  # a part of the model is called by itself
            return [0 for _ in self.keys]
        found = [None if key is None else call.prepared[key] for key in self.keys]
        return [0 if each is None else next(iter(each.values())).shape[-2] for each in found]

    def stacks(self, size: int) -> tuple[int, ...]:
        """Return the stack of each of `size` rows."""
        assert self.slot.call is not None
        return self.slot.call.expanded_rows(size, self.site.name)

    def rows(self, like: Tensor) -> Tensor:
        """Return the rows in front of tokens (B, T, d): (B, P, d), P being the longest prompt's."""
        width = max(self.lengths())
        found = [self._of(key, like, width) for key in self.keys]
        if len(found) == 1:
            return found[0].expand(like.shape[0], -1, -1)
        picked = [_row(found[stack], i) for i, stack in enumerate(self.stacks(like.shape[0]))]
        return torch.stack(picked)

    def _of(self, key: Hashable | None, like: Tensor, width: int) -> Tensor:
        """Return a stack's rows, hidden ones in front of them so that there are `width` (1 or B, P, d)."""
        if key is None:
            return like.new_zeros(1, width, like.shape[2])
        assert self.slot.call is not None
        rows = self.slot.call.prepared[key]["rows"]
        return nn.functional.pad(rows, (0, 0, width - rows.shape[1], 0)).to(like)

    def visible(self, size: int, device: torch.device) -> Tensor | None:
        """Return which of the P rows are real, (B, P); None if all are."""
        lengths = self.lengths()
        if len(set(lengths)) == 1:
            return None
        own = torch.tensor([lengths[stack] for stack in self.stacks(size)], device=device)
        width = max(lengths)
        return torch.arange(width, device=device)[None] >= width - own[:, None]


def _row(rows: Tensor, i: int) -> Tensor:
    """Return the i-th of `rows` (B, T, d); (1, T, d) and (T, d) are every row's."""
    if rows.dim() == 2:
        return rows
    return rows[i if rows.shape[0] > 1 else 0]


def joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Join tensors of one dtype in it; autocast would refuse one that is neither float32 nor its own."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return torch.cat(list(tensors), dim)


def run_rows(
    call: Call, alone: Call, site: SequenceSite, members: Sequence[tuple[Delta, At]]
) -> dict[str, Tensor]:
    """Evaluate a stack's virtual tokens once, batch 1, by themselves.

    `alone` is a call in which only that stack is active. In a causal stack of blocks they run through
    all of it, at positions −p … −1 if these are rotary, else 0 … p−1; returned are the keys and values
    they leave (what they leave depends on nothing but them). Elsewhere: what the first block reads.
    """
    rows = joined([delta(at).to(site.dtype) for delta, at in members], 0)[None]
    if isinstance(site.positions, nn.Embedding):
        _check_positions(site.positions, rows.shape[1])
    if site.entry is None:
        return {"rows": rows}
    alone.model, alone.recording, alone.prepared = call.model, {}, call.prepared
    alone.until = site.blocks[0] if site.blocks else None
    slot, before = call.slot, call.slot.call
    slot.call = alone
    try:
        if not site.blocks:
            _run_through(site, rows)
        else:
            rows = _until(site, rows)
    finally:
        slot.call = before
    if site.blocks:
        return {"rows": rows}
    recorded = alone.recording
    return {
        f"{name}/{part}": tensor
        for name, pair in recorded.items()
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }


def _run_through(site: SequenceSite, rows: Tensor) -> None:
    given: dict[str, Any] = {"inputs_embeds": rows}
    if site.rotary:
        given["position_ids"] = torch.arange(-rows.shape[1], 0, device=rows.device)[None]
    site.module(**given, use_cache=False)


def _until(site: SequenceSite, rows: Tensor) -> Tensor:
    """Return what the first block would read of embedded rows."""
    assert site.entry is not None
    try:
        entered: Tensor = site.entry(inputs_embeds=rows)
    except Entered as reached:
        entered = reached.hidden
    return entered


class Gate:
    """Around the first and the last block: virtual rows go in front of the tokens, and out again."""

    def __init__(self, virtual: Virtual, inner: Any, module: nn.Module) -> None:
        self.virtual, self.inner = virtual, inner
        first, last = virtual.site.blocks
        self.first, self.last = module is first, module is last and virtual.site.reader is None

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the block's arguments with the rows in."""
        if not self.first or not max(self.virtual.lengths()):
            return args, kwargs
        hidden = take_first(args, kwargs)[0]
        _check_room(hidden, args, kwargs)
        call = self.virtual.slot.call
        assert call is not None
        call.tokens[self.virtual.site.name] = hidden.shape[1]
        call.front = self.virtual.visible(hidden.shape[0], hidden.device)
        hidden = joined([self.virtual.rows(hidden), hidden], 1)
        if args:
            return (hidden, *args[1:]), kwargs
        return (), {**kwargs, next(iter(kwargs)): hidden}

    def outputs(self, x: Tensor, output: Any) -> Any:
        """Return the block's output with its own changes, the rows out."""
        if self.inner is not None:
            output = self.inner.outputs(x, output)
        width = max(self.virtual.lengths()) if self.last else 0
        if not width:
            return output
        if isinstance(output, tuple):
            return (output[0][:, width:], *output[1:])
        return output[:, width:]


def _check_room(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where rows among the tokens would be something else: packed tokens, or part of a cache."""
    cached = any(hasattr(a, "get_seq_length") for a in (*args, *kwargs.values()))
    if hidden.dim() == 3 and not cached:
        return
    raise StateError(
        "virtual tokens cannot enter here",
        saw="a cache of keys and values" if cached else f"hidden states of shape {tuple(hidden.shape)}",
        do="call the model with use_cache=False and unpacked batches, or use prefix_tuning",
    )


class Shifted:
    """A table of positions while virtual tokens have the first p: every token reads p rows further on.

    Only the table's view moves, so that whatever computes positions (a cache, `generate`, padding,
    the caller) need not know. `tables` are what each stack makes of it: None leaves it as it is.
    """

    def __init__(self, virtual: Virtual, tables: Sequence[Overlay | None]) -> None:
        self.virtual, self.tables = virtual, tuple(tables)

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        choices = list(zip(self.virtual.lengths(), self.tables, strict=True))
        found = {choice: self.run(*choice, module, base, args, kwargs) for choice in dict.fromkeys(choices)}
        if len(found) == 1:
            return found[choices[0]]
        call = self.virtual.slot.call
        assert call is not None
        size = call.batch or next(iter(found.values())).shape[0]
        stacks = self.virtual.stacks(size)
        return torch.stack([_row(found[choices[stack]], i) for i, stack in enumerate(stacks)])

    def run(
        self, p: int, overlay: Overlay | None, module: nn.Module, base: Base, args: Any, kwargs: Any
    ) -> Tensor:
        """Return what the table gives when its rows count from the p-th on."""
        table: Any = module
        if p == 0 and overlay is None:
            result: Tensor = base(*args, **kwargs)
            return result
        read = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        _check_positions(table, p, 1 if read is None or read.is_floating_point() else read.shape[-1])
        changed = {} if overlay is None else overlay.shadow(module)[0]._parameters
        weight = {**table._parameters, **changed}["weight"]
        shadow = shadow_of(module, table._inlay_base, {"weight": weight[p:]})
        moved: Tensor = type(shadow).forward(shadow, *args, **kwargs)
        return moved


def _check_positions(table: Any, virtual: int, tokens: int = 1) -> None:
    """Raise where virtual tokens and the others are more than a table has positions."""
    if virtual + tokens > table.num_embeddings:
        raise StateError(
            "virtual tokens and those of the text take more positions than the model has",
            saw=f"{virtual} virtual tokens, {tokens} of the text, {table.num_embeddings} positions",
            do="use a shorter prompt, or cut texts shorter (inlay train: --max-length)",
        )


class Turned:
    """What turns queries and keys of an encoder, for the rows too: they are before the first token."""

    def __init__(self, virtual: Virtual) -> None:
        self.virtual = virtual

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own, width = base(*args, **kwargs), max(self.virtual.lengths())
        if not width:
            return own
        positions = torch.arange(-width, 0, device=own[0].device)[None]
        if "position_ids" in kwargs:
            kwargs = {**kwargs, "position_ids": positions}
        else:
            args = (args[0], positions, *args[2:])
        front = base(*args, **kwargs)
        return tuple(torch.cat([f.expand(o.shape[0], -1, -1), o], 1) for f, o in zip(front, own, strict=True))


class Inner:
    """Around the model inside which rows run: what it tells of hidden states is about the tokens alone."""

    def __init__(self, virtual: Virtual) -> None:
        self.virtual = virtual

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = base(*args, **kwargs)
        call, width = self.virtual.slot.call, max(self.virtual.lengths())
        tokens = None if call is None else call.tokens.get(self.virtual.site.name)
        return output if tokens is None else _of_tokens(output, tokens, width)


def _of_tokens(output: Any, tokens: int, width: int) -> Any:
    """Return a model's output, the rows cut from the hidden states it lists."""

    def cut(value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == width + tokens
        return value[:, width:] if wide else value

    listed = enumerate(output) if isinstance(output, tuple) else output.items()
    found = {key: tuple(map(cut, value)) for key, value in listed if isinstance(value, tuple)}
    if isinstance(output, tuple):
        return tuple(found.get(i, value) for i, value in enumerate(output))
    for key, value in found.items():
        output[key] = value
    return output


class Reader:
    """Around a decoder that reads rows beside the encoder's tokens: they are no padding."""

    def __init__(self, virtual: Virtual) -> None:
        self.virtual = virtual

    def __call__(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states, width = kwargs.get("encoder_hidden_states"), max(self.virtual.lengths())
        if states is None or not width:
            return base(*args, **kwargs)
        mask, visible = kwargs.get("encoder_attention_mask"), self.virtual.visible(len(states), states.device)
        if visible is not None:
            _need_mask(module, self.virtual.site.name)
            if mask is None:
                mask = torch.ones(
                    len(states), states.shape[1] - width, dtype=torch.long, device=states.device
                )
        if mask is not None and mask.shape[-1] != states.shape[1] - width:
            return base(*args, **kwargs)  # what the decoder reads was made without rows
        if mask is not None:
            kwargs = {**kwargs, "encoder_attention_mask": widened_mask(mask, visible, width, len(states))}
        output = base(*args, **kwargs)
        if "cross_attentions" in output:
            output["cross_attentions"] = tuple(weights[..., width:] for weights in output["cross_attentions"])
        return output


def _need_mask(reader: nn.Module, name: str) -> None:
    if not accepts(reader, "encoder_attention_mask"):
        raise StateError(
            "prompts of different length cannot share a batch here",
            saw=f"the {type(reader).__name__} that reads {name} takes no mask",
            do="call the model for the rows of each stack by themselves, or use prompts of one length",
        )
