"""Site descriptions: plain data that anatomy produces, methods read and placement uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.backends import backend_of
from inlay.sites.slice import Slice


@dataclass(eq=False, kw_only=True)
class Site:
    """A place in one model. `module` is the module whose call the delta takes part in.

    `role`, `layer` (index of the block in its stack), `side` ("encoder", "decoder" or "") and
    `cross` say what the place means; `name` is unique in the model and stable across processes.
    `around` is the model's dtype where the module is quantised and its own tensors do not say it.
    """

    name: str
    module: nn.Module
    role: str = ""
    layer: int | None = None
    side: str = ""
    cross: bool = False
    around: torch.dtype | None = None
    kind: ClassVar[str] = ""
    faces: ClassVar[frozenset[str]] = frozenset()

    @property
    def reference(self) -> Tensor:
        """A tensor with the dtype and device new parameters take here."""
        found = reference_of(self.like)
        return found if self.around is None else found.to(self.around)

    @property
    def like(self) -> nn.Module:
        """The module whose tensors new parameters resemble in dtype and device."""
        return self.module

    @property
    def in_features(self) -> int:
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        raise NotImplementedError


@dataclass(eq=False, kw_only=True)
class ModuleSite(Site):
    """A leaf layer, a slice of a fused projection's outputs, or one expert's matrix among all experts'.

    `layer_kind` is "linear", "conv1d" (transformers', weights stored (in, out)), "conv" (torch's of
    one to three dimensions), "embedding", "norm" or
    "parameter" (any other module's own tensor, named by `weight_name`). `expert` is the place in a
    3-D tensor that holds one such matrix per expert.
    """

    layer_kind: str
    part: Slice | None = None
    expert: int | None = None
    weight_name: str = "weight"
    bias_name: str | None = "bias"

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.layer_kind

    @property
    def faces(self) -> frozenset[str]:  # type: ignore[override]
        if self.layer_kind in ("linear", "conv1d"):
            return frozenset({"output", "weight"} | (set() if self.part else {"input"}))
        if self.layer_kind == "parameter":
            return frozenset({"weight"})
        return frozenset({"output", "weight"})

    @property
    def by_weight(self) -> bool:
        """Whether a change can act here only as a change of the weights: the layer itself is not called."""
        return isinstance(self.module, nn.MultiheadAttention)

    @property
    def called(self) -> bool:
        """Whether the layer is a module by itself, whose call shows what it reads."""
        return self.expert is None and not self.by_weight

    def tensor(self, name: str | None) -> Tensor | None:
        """Return the module's tensor `name`; with a dot, one of a module inside it."""
        owner, leaf = held_by(self.module, name or "")
        found: Tensor | None = getattr(owner, leaf, None)
        return found

    @property
    def is_linear(self) -> bool:
        return self.layer_kind in ("linear", "conv1d")

    @property
    def quantised(self) -> bool:
        """Whether the layer keeps its weight in few bits."""
        return backend_of(self.module) is not None

    @property
    def has_bias(self) -> bool:
        return self.bias_name is not None and self.tensor(self.bias_name) is not None

    @property
    def resized(self) -> bool:
        """Whether the layer has another size than when the site was first used."""
        return replace(self)._features != self._features

    @cached_property
    def _features(self) -> tuple[int, int]:
        """(out, in) of the layer or slice; a vector of n features counts as (n, n)."""
        module: Any = self.module
        if self.layer_kind == "linear" and self.weight_name == "weight":
            # its weight may be packed, or no tensor of its own
            shape = (int(module.out_features), int(module.in_features))
            return shape if self.part is None else (self.part.size, shape[1])
        weight = self.tensor(self.weight_name)
        assert weight is not None
        weight = weight if self.expert is None else weight[self.expert]
        if self.layer_kind == "linear":
            shape = (weight.shape[0], weight.shape[1])
        elif self.layer_kind == "conv1d" or self.layer_kind == "embedding":
            shape = (weight.shape[1], weight.shape[0])
        elif self.layer_kind == "conv":
            shape = (weight.shape[0], int(module.in_channels))
        else:
            shape = (weight.shape[-1], weight.shape[-1])
        return shape if self.part is None else (self.part.size, shape[1])

    def cut(self, whole: Tensor) -> Tensor:
        """Return this site's part of one of its module's tensors, a matrix as (out, in)."""
        own = whole if self.expert is None else whole[self.expert]
        own = self.turned(own)
        return own if self.part is None else self.part.take(own, 0)

    def turned(self, matrix: Tensor) -> Tensor:
        """Turn a matrix as it is stored into (out, in), or back; a vector stays."""
        return matrix.T if self.layer_kind == "conv1d" and matrix.dim() == 2 else matrix

    @property
    def output_scale(self) -> float:
        """What an embedding multiplies its rows by (Gemma's and BART's do), else 1."""
        scale = getattr(self.module, "embed_scale", None)
        if not isinstance(scale, Tensor):
            return 1.0 if scale is None else float(scale)
        if scale.device.type == "meta":
            scale = torch.tensor(getattr(self.module, "scalar_embed_scale", 1.0))
        return float(scale.to(self.reference.dtype))  # such a buffer acts rounded to the weight's dtype

    @property
    def in_features(self) -> int:
        return self._features[1]

    @property
    def out_features(self) -> int:
        return self._features[0]


@dataclass(frozen=True)
class Tap:
    """Where a tensor can be read in passing: argument number `position`, or `name`, of a module's call."""

    module: nn.Module
    position: int
    name: str


@dataclass(eq=False, kw_only=True)
class SublayerSite(Site):
    """An attention or feed-forward sublayer, in whatever modules it lies.

    `module` is the one whose output is y (after the sublayer's dropout, before the residual add);
    `x` taps what the sublayer's first linear reads, `residual` what is added to y; `norm` is the
    layer norm applied to the sum (post-norm models), else None.
    """

    features: int
    x: Tap
    residual: Tap | None = None
    norm: nn.Module | None = None
    kind: ClassVar[str] = "sublayer"
    faces: ClassVar[frozenset[str]] = frozenset({"output"})

    @property
    def like(self) -> nn.Module:
        return self.x.module

    @property
    def in_features(self) -> int:
        return self.features

    @property
    def out_features(self) -> int:
        return self.features


@dataclass(eq=False, kw_only=True)
class AttentionSite(Site):
    """One attention module that calls transformers' attention interface."""

    features: int
    heads: int
    kv_heads: int
    head_dim: int
    index: int = 0  # among the attentions of the same stack and sort (encoder, decoder, cross)
    count: int = 1
    kind: ClassVar[str] = "attention"
    faces: ClassVar[frozenset[str]] = frozenset({"attention"})

    @property
    def in_features(self) -> int:
        return self.features

    @property
    def out_features(self) -> int:
        return self.features


@dataclass(eq=False, kw_only=True)
class BlockSite(Site):
    """A whole transformer block: x its input, y the residual stream it gives."""

    features: int
    kind: ClassVar[str] = "block"
    faces: ClassVar[frozenset[str]] = frozenset({"output"})

    @property
    def in_features(self) -> int:
        return self.features

    @property
    def out_features(self) -> int:
        return self.features


@dataclass(eq=False, kw_only=True)
class SequenceSite(Site):
    """The tokens one stack of blocks reads; `module` is the transformers model around the blocks.

    `attentions` are those of the blocks. A causal stack meets virtual tokens there, as keys and
    values; elsewhere they enter in front of the first of `blocks` and leave behind the last, unless
    a `reader` (the decoder) reads them too. `entry` makes of embedded tokens what the first block
    reads, with `positions` as its table (for `rotary` encoders: what turns queries and keys); both are
    None where there are no tokens (patches, sound).
    """

    features: int
    embedding: nn.Embedding | None
    attentions: tuple[AttentionSite, ...] = field(default=())
    blocks: tuple[nn.Module, ...] = field(default=())
    entry: nn.Module | None = None
    positions: nn.Module | None = None
    rotary: bool = False
    reader: nn.Module | None = None
    kind: ClassVar[str] = "sequence"
    faces: ClassVar[frozenset[str]] = frozenset({"sequence"})

    @property
    def like(self) -> nn.Module:
        return self.embedding or self.attentions[0].module

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that rows enter in: asked at each call, so read off one tensor."""
        return next(self.like.parameters()).dtype

    @property
    def in_features(self) -> int:
        return self.features

    @property
    def out_features(self) -> int:
        return self.features


def held_by(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return which module, `module` or one inside it, has the tensor `name`, and what it calls it."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def reference_of(module: nn.Module) -> Tensor:
    """Return an empty tensor with the device and floating dtype the module computes in."""
    device = next((execution_device(part) or t.device for part, t in _tensors_in(module)), None)
    return torch.empty(0, dtype=plain_dtype(module) or _compute_dtype(module), device=device)


def _tensors_in(module: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield (owner, tensor): every parameter, then every buffer."""
    for tensors in ("_parameters", "_buffers"):
        for part in module.modules():
            yield from ((part, t) for t in getattr(part, tensors).values() if t is not None)


def _compute_dtype(module: nn.Module) -> torch.dtype:
    """Return what the quantised layers inside say they compute in, else torch's default."""
    backends = ((part, backend_of(part)) for part in module.modules())
    found = (backend.compute_dtype(part) for part, backend in backends if backend is not None)
    return next((dtype for dtype in found if dtype is not None), torch.get_default_dtype())


def plain_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of the first floating parameter of the layers inside that are not quantised."""
    plain = (part for part in module.modules() if backend_of(part) is None)
    tensors = (tensor for part in plain for tensor in part.parameters(recurse=False))
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """Return the hooks that accelerate put on a module."""
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def execution_device(module: nn.Module) -> torch.device | None:
    """Return where accelerate brings an offloaded module's tensors for its call, if it does."""
    devices = (getattr(hook, "execution_device", None) for hook in hooks_of(module))
    return next((torch.device(device) for device in devices if device is not None), None)
