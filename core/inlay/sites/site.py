"""Site descriptions: plain data that anatomy produces, methods read and placement uses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.sites.slice import Slice


@dataclass(eq=False, kw_only=True)
class Site:
    """A place in one model. `module` is the module whose call the delta takes part in.

    `role`, `layer` (index of the block in its stack), `side` ("encoder", "decoder" or "") and
    `cross` say what the place means; `name` is unique in the model and stable across processes.
    """

    name: str
    module: nn.Module
    role: str = ""
    layer: int | None = None
    side: str = ""
    cross: bool = False
    kind: ClassVar[str] = ""
    faces: ClassVar[frozenset[str]] = frozenset()

    @property
    def reference(self) -> Tensor:
        """A tensor with the dtype and device new parameters take here."""
        return reference_of(self.module)

    @property
    def in_features(self) -> int:
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        raise NotImplementedError


@dataclass(eq=False, kw_only=True)
class ModuleSite(Site):
    """A leaf layer, or a slice of a fused projection's outputs.

    `layer_kind` is "linear", "conv1d" (weights stored (in, out)), "conv2d", "embedding", "norm" or
    "parameter" (any other module's own tensor, named by `weight_name`).
    """

    layer_kind: str
    part: Slice | None = None
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
    def is_linear(self) -> bool:
        return self.layer_kind in ("linear", "conv1d")

    @property
    def has_bias(self) -> bool:
        return self.bias_name is not None and getattr(self.module, self.bias_name, None) is not None

    @property
    def resized(self) -> bool:
        """Whether the layer has another size than when the site was first used."""
        return replace(self)._features != self._features

    @cached_property
    def _features(self) -> tuple[int, int]:
        """(out, in) of the layer or slice; a vector of n features counts as (n, n)."""
        module, weight = self.module, getattr(self.module, self.weight_name)
        if self.layer_kind == "linear":
            shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        elif self.layer_kind == "conv1d" or self.layer_kind == "embedding":
            shape = (weight.shape[1], weight.shape[0])
        elif self.layer_kind == "conv2d":
            shape = (weight.shape[0], int(module.in_channels))  # type: ignore[arg-type]
        else:
            shape = (weight.shape[-1], weight.shape[-1])
        return shape if self.part is None else (self.part.size, shape[1])

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
    def reference(self) -> Tensor:
        return reference_of(self.x.module)

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
    def reference(self) -> Tensor:
        return reference_of(self.embedding or self.attentions[0].module)

    @property
    def in_features(self) -> int:
        return self.features

    @property
    def out_features(self) -> int:
        return self.features


def reference_of(module: nn.Module) -> Tensor:
    """Return an empty tensor with the device and floating dtype the module computes in."""
    device: torch.device | None = None
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            device = device or execution_device(part) or parameter.device
            if parameter.is_floating_point():
                return torch.empty(0, dtype=parameter.dtype, device=device)
    dtype = getattr(module, "compute_dtype", None) or torch.get_default_dtype()
    return torch.empty(0, dtype=dtype, device=device)


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """Return the hooks that accelerate put on a module."""
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def execution_device(module: nn.Module) -> torch.device | None:
    """Return where accelerate brings an offloaded module's tensors for its call, if it does."""
    devices = (getattr(hook, "execution_device", None) for hook in hooks_of(module))
    return next((torch.device(device) for device in devices if device is not None), None)
