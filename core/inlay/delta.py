"""Deltas: what a method changes at a site. One class per face; `forward` is that face.

Symbols: x what the site reads, y what it gave so far, W (out, in) and b (out,) its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from inlay.context import At


class Ref:
    """A module used but not owned: not registered, not saved twice. `ref.module` is the module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


Fold = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Delta(nn.Module):
    """A change at one site. Owns its parameters; never touches the base's.

    `reads` says what the delta needs beside x, so that core can provide it and knows what
    commutes: "y" (the output so far), "weight" (the level below, see `At.weight`), "residual"
    and "norm" (sublayers).
    """

    face: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()
    replaces: ClassVar[bool] = False  # whether it puts values in the place of what is below it

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (weight, bias) with this delta folded in: pure, (out, in), float32 or wider."""
        raise NotImplementedError

    def reached(self) -> Iterator[nn.Parameter]:
        """Yield the parameters its value depends on: its own, and those of shared parts it refers to."""
        yield from self.parameters()
        for module in self.modules():
            for value in vars(module).values():
                for held in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(held, Ref):
                        yield from held.module.parameters()

    @property
    def folds(self) -> bool:
        """Whether this delta has a weight form at its site."""
        return type(self).fold is not Delta.fold

    @property
    def additive(self) -> bool:
        """Whether the delta is a function of x alone, so that it commutes with its like."""
        return self.face in ("output", "weight") and not self.reads

    def why_not(self) -> str:
        """Say why there is no weight form here."""
        return f"{type(self).__name__} is not a linear change of its site's weights"


class OutputDelta(Delta):
    """`forward(x, y, at) -> Δy`. LoRA, adapters, (IA)^3 on keys and values, LoReFT on a block."""

    face: ClassVar[str] = "output"

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        raise NotImplementedError


class InputDelta(Delta):
    """`forward(x, at) -> Δx`. (IA)^3 on the feed-forward's inner activation, orthogonal methods."""

    face: ClassVar[str] = "input"

    def forward(self, x: Tensor, at: At) -> Tensor:
        raise NotImplementedError


class WeightDelta(Delta):
    """`forward(level) -> Change` of the site's own tensors. BitFit, trained heads, sparse deltas.

    Core chooses how it acts: added to the output of a linear layer, or by running the layer with
    changed tensors. A delta that looks at `level.weight` declares `reads = {"weight"}`; one that
    owns full values returns `Change(..., replaces=True)` and declares `replaces`.
    """

    face: ClassVar[str] = "weight"

    def forward(self, level: Weights) -> Change:
        raise NotImplementedError

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change: Change = self(FixedWeights(weight, bias))
        return change.apply(weight, bias)

    @property
    def additive(self) -> bool:
        return super().additive and not self.replaces


class AttentionDelta(Delta):
    """`forward(at) -> KeyValues`: extra keys and values of one attention module. Prefix tuning."""

    face: ClassVar[str] = "attention"

    def forward(self, at: At) -> KeyValues:
        raise NotImplementedError


class SequenceDelta(Delta):
    """`forward(at) -> rows (p, d)`: virtual tokens in front of the sequence. Prompt tuning."""

    face: ClassVar[str] = "sequence"

    def forward(self, at: At) -> Tensor:
        raise NotImplementedError


class KeyValues(NamedTuple):
    """Extra attention columns: key and value (1 or B, kv heads, p, head dim).

    `visible` (B, p) hides columns per sample; None shows all.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None = None


class Weights(Protocol):
    """What a member may know of the level below it, in (out, in) orientation, float32 or wider."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


class FixedWeights(NamedTuple):
    """The simplest `Weights`: two tensors in hand."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Factored:
    """ΔW = scale · up @ down, with down (r, in) and up (out, r), never formed in the forward."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def dense(self, like: Tensor) -> Tensor:
        return self.scale * (self.up.to(like.dtype) @ self.down.to(like.dtype))

    def effect(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.down.to(x.dtype))
        return F.linear(inner if self.scale == 1 else inner * self.scale, self.up.to(x.dtype))


@dataclass(frozen=True)
class Compact:
    """ΔW as `values` (k,) at flat row-major `indices` (k,) of an (out, in) matrix or a vector."""

    indices: Tensor
    values: Tensor

    def dense(self, like: Tensor) -> Tensor:
        flat = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
        return flat.index_put((self.indices.long(),), self.values.to(like.dtype)).view(like.shape)


@dataclass(frozen=True)
class Change:
    """A change of a layer's weight and bias: added, or (`replaces`) put in their place."""

    weight: Tensor | Factored | Compact | None = None
    bias: Tensor | Compact | None = None
    replaces: bool = False

    def apply(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the changed tensors; the old ones stay as they are."""
        if self.weight is not None:
            change = dense(self.weight, weight)
            weight = change if self.replaces else weight + change
        if self.bias is not None:
            base = weight.new_zeros(weight.shape[0]) if bias is None else bias
            change = dense(self.bias, base)
            bias = change if self.replaces or bias is None else bias + change
        return weight, bias

    def effect(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return what an added change does to the output of a linear layer of `shape` (out, in)."""
        like = x.new_zeros(()).expand(shape)
        bias = None if self.bias is None else dense(self.bias, like[:, 0])
        if self.weight is None:
            return x.new_zeros(()) if bias is None else bias
        if isinstance(self.weight, Factored):
            change = self.weight.effect(x)
            return change if bias is None else change + bias
        return F.linear(x, dense(self.weight, like), bias)


def dense(change: Tensor | Factored | Compact, like: Tensor) -> Tensor:
    """Return `change` as a full tensor shaped and typed like `like`."""
    return change.to(like.dtype) if isinstance(change, Tensor) else change.dense(like)
