"""The roles of a model, read off its module tree: blocks, the layers inside, sublayers, the rest."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from inlay.anatomy.blocks import Block, find_blocks
from inlay.anatomy.corrections import KEPT, Role, parts_of, remember, told
from inlay.anatomy.kinds import layer_kind, shape_of, token_embedding
from inlay.anatomy.roles import ATTENTION, FEED_FORWARD, FUSED, alias, fused_parts, gated_parts, is_attention
from inlay.anatomy.sublayers import Sublayers, attention_sites
from inlay.errors import ConfigError
from inlay.experts import expert_sites, holds_experts
from inlay.hosts import Deltas
from inlay.multihead import multihead_sites
from inlay.sites import BlockSite, ModuleSite, SequenceSite, Slice

OUTSIDE_BLOCKS = {"norm": "norm", "conv": "embedding", "linear": "pooler"}  # the convolution embeds patches
HEADS = ("head", "classifier", "lm_head", "fc", "score")  # of models that are none of transformers
ROLES = ("query", "key", "value", "output", "gate", "up", "down", "attention", "ffn", "norm",
         "embedding", "pooler", "head", "block", "linear", "cross_attention")  # fmt: skip


Parts = list[tuple[str, Slice | None]]


class Anatomy:
    """The roles found in `model`. Cheap: one pass over the modules; works on the meta device."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = _base_modules(model)
        self.names: dict[nn.Module, str] = {module: name for name, module in self.modules.items()}
        self.told: dict[str, Role] = told(model, list(self.modules))
        attentions = [
            n for n, m in self.modules.items() if self.told.get(n) == "attention" or is_attention(m)
        ]
        self.blocks = find_blocks(self.modules, attentions, self._two_sided())
        self._inside = {id(m): block for block in self.blocks for m in block.module.modules()}
        self.leaves: list[ModuleSite] = list(self._leaves())
        self._whole = {s.name: s for s in self.leaves if s.part is None and s.expert is None}
        self._parts: dict[nn.Module, list[ModuleSite]] = {}  # layers inside modules that run them all
        self._of_block: dict[int, list[ModuleSite]] = {}
        for site in self.leaves:
            if not site.called:
                self._parts.setdefault(site.module, []).append(site)
            if block := self._inside.get(id(site.module)):
                self._of_block.setdefault(id(block), []).append(site)
        self.sublayers = [s for b in self.blocks for s in Sublayers(self, b, self.inside(b))]
        self.attentions = attention_sites(self)

    @property
    def family(self) -> str:
        """A word for the model in messages."""
        return type(self.model).__name__

    def __str__(self) -> str:
        from inlay.anatomy.tree import drawn

        return drawn(self)

    __repr__ = __str__

    def override(self, roles: Mapping[str, Role]) -> Anatomy:
        """Correct what was found, for this model object: {pattern of module names: role}; return it anew.

        A role is that of a layer ("query", "up", "norm", …, "" for none), "attention" for a module
        that is one, or the sizes of consecutive slices: {"query": 64, "key": 16, "value": 16}. A
        pattern is a name's last components or a glob, as in targets.

        Raises `ConfigError`, nothing remembered, where a pattern names no module, a role is unknown,
        or slices do not make up their layer.
        """
        before = self.model.__dict__.get(KEPT)
        remember(self.model, roles, list(self.modules))
        try:
            return Anatomy(self.model)
        except ConfigError:
            if before is None:
                del self.model.__dict__[KEPT]
            else:
                self.model.__dict__[KEPT] = before
            raise

    def inside(self, block: Block) -> list[ModuleSite]:
        """Return the leaf layers of a block."""
        return self._of_block.get(id(block), [])

    def unsplit(self) -> list[str]:
        """Say which layers are fused projections by their name, yet of a size that no layout explains."""
        attentions = {name for block in self.blocks for name, _, _ in block.attentions}
        return [
            f"{s.name} has {s.out_features} outputs, of {s.in_features} inputs"
            for s in self.leaves
            if s.part is None and not s.role and s.name.rpartition(".")[2] in FUSED
            and s.name.rpartition(".")[0] in attentions
        ]  # fmt: skip

    def block_sites(self) -> list[BlockSite]:
        sublayer = {s.name.rpartition(".")[0]: s.features for s in self.sublayers}
        return [
            BlockSite(name=b.name, module=b.module, role="block", layer=b.layer, side=b.side,
                      features=sublayer.get(b.name, 0))
            for b in self.blocks if b.whole
        ]  # fmt: skip

    def sequence_sites(self) -> list[SequenceSite]:
        """The stacks of blocks that virtual tokens can enter."""
        from inlay.anatomy import sequence

        return sequence.find(self)[0]

    def leaf(self, name: str, module: nn.Module) -> ModuleSite | None:
        """Return a site for a leaf layer known only by name, or None if its kind is unknown."""
        if name in self._whole:
            return self._whole[name]
        kind = layer_kind(module)
        block = self._inside.get(id(module))
        if kind is None:
            return None
        return ModuleSite(name=name, module=module, layer_kind=kind, layer=block.layer if block else None,
                          side=block.side if block else "")  # fmt: skip

    def parameters_under(self, module: nn.Module) -> list[ModuleSite]:
        """Return sites covering every parameter below `module`: leaf layers, their parts, bare tensors."""
        found: list[ModuleSite] = []
        for child in (m for m in module.modules() if m in self.names):
            name, block = self.names[child], self._inside.get(id(child))
            if child in self._parts:
                found += self._parts[child]
                continue
            if isinstance(self._parent(name), nn.MultiheadAttention):
                continue
            layer, side = (block.layer, block.side) if block else (None, "")
            own = [n for n, _ in child.named_parameters(recurse=False)]
            if own and (site := self.leaf(name, child)) is not None and set(own) <= {"weight", "bias"}:
                found.append(site)
                continue
            found += [
                ModuleSite(name=f"{name}.{n}".lstrip("."), module=child, layer_kind="parameter", layer=layer,
                           side=side, weight_name=n, bias_name=None)
                for n in own
            ]  # fmt: skip
        return found

    def _two_sided(self) -> bool:
        """Whether the model has an encoder and a decoder."""
        torchs = any(isinstance(module, nn.Transformer) for module in self.modules.values())
        return torchs or bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    # -- leaf layers -----------------------------------------------------------------------------

    def _leaves(self) -> Iterator[ModuleSite]:
        heads = {id(m) for root in self._head_modules() for m in root.modules()}
        embeddings = self._called_embeddings()
        for name, module in self.modules.items():
            kind = layer_kind(module)
            block = self._inside.get(id(module))
            layer, side = (block.layer, block.side) if block else (None, "")
            if isinstance(module, nn.MultiheadAttention):
                cross = block is not None and (name, module, True) in block.attentions
                yield from multihead_sites(name, module, layer, side, cross)
            elif holds_experts(module):
                yield from expert_sites(name, module, layer, side)
            if kind is None or isinstance(self._parent(name), nn.MultiheadAttention):
                continue
            parts, cross = self._leaf_parts(name, module, kind, block)
            if name in self.told:
                parts = parts_of(name, self.told[name], shape_of(module, kind)[0])
            elif id(module) in heads:
                parts = [("head", None)]
            elif module in embeddings:
                parts = [("embedding", None)]
            for role, part in parts:
                yield ModuleSite(
                    name=f"{name}[{role}]" if part else name, module=module, role=role, layer=layer,
                    side=side, cross=cross, layer_kind=kind, part=part,
                )  # fmt: skip

    def _parent(self, name: str) -> nn.Module:
        return self.modules[name.rpartition(".")[0]]

    def _leaf_parts(self, name: str, module: nn.Module, kind: str, block: Block | None) -> tuple[Parts, bool]:
        """Return the roles of a layer, or of its slices, and whether it is part of cross-attention."""
        if block is None and kind in OUTSIDE_BLOCKS:
            role = OUTSIDE_BLOCKS[kind]
            return [(role if kind != "linear" or "pooler" in name.split(".") else "", None)], False
        if block is None or kind not in ("linear", "conv1d"):
            inside = block is not None and any(name.startswith(a + ".") for a, _, _ in block.attentions)
            return [("norm" if kind == "norm" and not inside else "", None)], False
        leaf = name.rsplit(".", 1)[-1]
        for path, attention, cross in block.attentions:
            if name.startswith(path + "."):
                leaf = name.rsplit(".", 2)[-2] if leaf == "0" else leaf  # a list of the layer and its dropout
                fused = fused_parts(leaf, attention, *shape_of(module, kind))
                return [*fused] or [(alias(leaf, ATTENTION), None)], cross
            parent = path.rsplit(".", 1)[0]
            if "att" in parent.rsplit(".", 1)[-1].lower() and name.startswith(f"{parent}."):
                return [("output", None)], cross
        below = name[len(block.name) :].lower()
        if "att" in below or "embedder" in below:  # an attention that is none we know; a time's embedding
            return [("", None)], False
        if leaf == "dense":
            return [("up" if name.split(".")[-2] in ("intermediate", "dense") else "down", None)], False
        halves = gated_parts(leaf, shape_of(module, kind)[0])
        return [*halves] or [(alias(leaf, FEED_FORWARD) or self._in_sequence(name), None)], False

    def _in_sequence(self, name: str) -> str:
        """Return the role of a layer of a feed-forward written as a list: first up, last down."""
        path, _, leaf = name.rpartition(".")
        if path.endswith(".net.0"):  # diffusers' holds its first layer together with the activation
            path, leaf = path.removesuffix(".0"), f"0.{leaf}"
        listed = path.endswith(".net")
        if not listed and not isinstance(self.modules[path], nn.Sequential):
            return ""
        below = self.modules[path].named_modules()
        linear = [n for n, m in below if layer_kind(m) == "linear" and n.count(".") <= listed]
        return {linear[0]: "up", linear[-1]: "down"}.get(leaf, "") if len(linear) > 1 else ""

    def _head_modules(self) -> list[nn.Module]:
        model = self.model
        prefix = getattr(model, "base_model_prefix", "")
        found: list[nn.Module] = []
        if prefix and isinstance(getattr(model, prefix, None), nn.Module):
            found = [m for n, m in model.named_children() if n != prefix]
        elif not prefix:
            found = [m for n, m in model.named_children() if n in HEADS]
        getter: Any = getattr(model, "get_output_embeddings", None)
        output = None if getter is None else getter()
        return found + ([output] if output is not None and output not in found else [])

    def _called_embeddings(self) -> list[nn.Module]:
        """Return the token embeddings that run. T5 keeps one beside its two stacks', tied, uncalled."""
        embedding = token_embedding(self.model)
        if embedding is None:
            return []
        others = [m for m in self.modules.values() if isinstance(m, nn.Embedding) and m is not embedding]
        tied: list[nn.Module] = [m for m in others if m.weight is embedding.weight]
        return tied or [embedding]


def anatomy(model: nn.Module) -> Anatomy:
    """Return which module of `model` plays which role; printed, it is a tree with the roles beside it.

    Cheap, and works on the meta device. What it missed can be corrected: see `Anatomy.override`.
    """
    from inlay.plan import check_module

    check_module(model, "anatomy")
    return Anatomy(model)


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by path, without those of adapters attached before."""
    own = {id(m) for deltas in model.modules() if isinstance(deltas, Deltas) for m in deltas.modules()}
    return {name: m for name, m in model.named_modules() if id(m) not in own}


def uses_attention_interface(module: nn.Module) -> bool:
    """Return whether the module's own file calls attention through transformers' interface."""
    source = sys.modules.get(type(module).__module__)
    return hasattr(source, "ALL_ATTENTION_FUNCTIONS") and hasattr(module, "config")
