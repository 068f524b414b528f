"""Gradient checkpointing: a block computed again in backward sees the call it first ran in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inlay.context import Call, Slot


class Bound:
    """A gradient checkpointing function that recomputes each block under the call it first ran in.

    Reentrant checkpointing sees `prepared` tensors as detached leaves; `_Collect`, in front of
    each block, hands what gathered on them back once.
    """

    def __init__(self, checkpoint: Callable[..., Any], slot: Slot) -> None:
        self.checkpoint, self.slot = checkpoint, slot

    @property
    def reentrant(self) -> bool:
        keywords = self.checkpoint.keywords if isinstance(self.checkpoint, partial) else {}
        return bool(keywords.get("use_reentrant", False))

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.slot.call
        if call is not None and call.recording is not None:
            return function(*args)
        if self.reentrant and args and isinstance(args[0], Tensor) and torch.is_grad_enabled():
            call, args = _with_leaves(call, args)
        return self.checkpoint(InCall(function, self.slot, call), *args, **kwargs)


class InCall:
    """`function`, run under `call` (None: the active adapters) in whatever thread and choice it runs."""

    def __init__(self, function: Callable[..., Any], slot: Slot, call: Call | None) -> None:
        self.function, self.slot, self.call = function, slot, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, self.slot.call = self.slot.call, self.call
        try:
            return self.function(*args, **kwargs)
        finally:
            self.slot.call = before
            if before is None:  # a backward pass computed a block again; nothing else lets go of its taps
                self.slot.taps.clear()


def _with_leaves(call: Call | None, args: tuple[Any, ...]) -> tuple[Call | None, tuple[Any, ...]]:
    """Return `call` with prepared tensors as leaves, and `args` whose first tensor collects for them.

    A reentrant checkpoint also loses its graph if no input requires a gradient (frozen
    embeddings); then the block's input is made to.
    """
    hidden, rest = args[0], args[1:]
    if call is None or not call.prepared:
        return call, (hidden if hidden.requires_grad else hidden.detach().requires_grad_(), *rest)
    pairs: list[tuple[Tensor, Tensor]] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        pairs.append((tensor, tensor.detach().requires_grad_()))
        return pairs[-1][1]

    inner = call.with_prepared({k: {n: leaf(t) for n, t in v.items()} for k, v in call.prepared.items()})
    leaves = [leaf for _, leaf in pairs]
    hidden = _Collect.apply(hidden, leaves, *(tensor for tensor, _ in pairs))  # type: ignore[no-untyped-call]
    return inner, (hidden if hidden.requires_grad else hidden.detach().requires_grad_(), *rest)


class _Collect(torch.autograd.Function):
    """Identity on a block's input; its backward runs after the block's and returns the leaves' gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: list[Tensor], *sources: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (grads[0], None, *(leaf.grad for leaf in ctx.leaves))
