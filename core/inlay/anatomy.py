"""Anatomy: which module of a model plays which role, read off the module tree.

Only this file and `sites/` look into foreign models. Blocks are the repeated elements that hold
attention modules; roles inside come from a short table of the names model authors use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from inlay.hosts import Deltas
from inlay.roles import (
    ATTENTION,
    DIMS,
    FEED_FORWARD,
    alias,
    fused_parts,
    gated_parts,
    heads_of,
    is_attention,
    of,
)
from inlay.sites import AttentionSite, BlockSite, ModuleSite, SequenceSite, Slice, SublayerSite, Tap

OUTSIDE_BLOCKS = {"norm": "norm", "conv2d": "embedding", "linear": "pooler"}  # the convolution embeds patches
ROLES = ("query", "key", "value", "output", "gate", "up", "down", "attention", "ffn", "norm",
         "embedding", "pooler", "head", "block", "linear", "cross_attention")  # fmt: skip


Parts = list[tuple[str, Slice | None]]


@dataclass
class Block:
    """One transformer block and what was found in it."""

    name: str
    module: nn.Module
    layer: int
    side: str
    attentions: list[tuple[str, nn.Module, bool]] = field(default_factory=list)  # name, module, cross


class Anatomy:
    """The roles found in `model`. Cheap: one pass over the modules; works on the meta device."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = _base_modules(model)
        self.names: dict[nn.Module, str] = {module: name for name, module in self.modules.items()}
        self.blocks = self._find_blocks()
        self._inside = {id(m): block for block in self.blocks for m in block.module.modules()}
        self.leaves: list[ModuleSite] = list(self._leaves())
        self._whole = {id(s.module): s for s in self.leaves if s.part is None}
        self.sublayers: list[SublayerSite] = [s for b in self.blocks for s in self._sublayers(b)]
        self.attentions: list[AttentionSite] = self._attention_sites()

    @property
    def family(self) -> str:
        """A word for the model in messages."""
        return type(self.model).__name__

    def block_sites(self) -> list[BlockSite]:
        sublayer = {s.layer: s.features for s in self.sublayers}
        return [
            BlockSite(name=b.name, module=b.module, role="block", layer=b.layer, side=b.side,
                      features=sublayer.get(b.layer, 0))
            for b in self.blocks
        ]  # fmt: skip

    def sequence_sites(self) -> list[SequenceSite]:
        """The stacks of blocks that virtual tokens can enter."""
        from inlay import sequence

        return sequence.find(self)[0]

    def leaf(self, name: str, module: nn.Module) -> ModuleSite | None:
        """Return a site for a leaf layer known only by name, or None if its kind is unknown."""
        if id(module) in self._whole:
            return self._whole[id(module)]
        kind = layer_kind(module)
        block = self._inside.get(id(module))
        if kind is None:
            return None
        return ModuleSite(name=name, module=module, layer_kind=kind, layer=block.layer if block else None,
                          side=block.side if block else "")  # fmt: skip

    def parameters_under(self, module: nn.Module) -> list[ModuleSite]:
        """Return sites covering every parameter below `module`: leaf layers, and bare tensors."""
        found: list[ModuleSite] = []
        for child in (m for m in module.modules() if m in self.names):
            name, block = self.names[child], self._inside.get(id(child))
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

    # -- blocks ----------------------------------------------------------------------------------

    def _find_blocks(self) -> list[Block]:
        attentions = [(n, m) for n, m in self.modules.items() if is_attention(m)]
        blocks: dict[str, Block] = {}
        for name, module in attentions:
            path = self._block_path(name, [n for n, _ in attentions])
            if path is None:
                continue
            if path not in blocks:
                blocks[path] = Block(path, self.modules[path], int(path.rsplit(".", 1)[-1]), self._side(path))
            inner = name[len(path) :].lower()
            cross = any(word in inner for word in ("cross", "encdec", "encoder_attn"))
            blocks[path].attentions.append((name, module, cross))
        return list(blocks.values())

    def _block_path(self, name: str, attentions: list[str]) -> str | None:
        """Return the outermost list element above `name` that holds at most two attentions."""
        parts = name.split(".")
        for end in range(1, len(parts)):
            path = ".".join(parts[:end])
            parent = self.modules[".".join(parts[: end - 1])]
            held = sum(a.startswith(path + ".") for a in attentions) if parts[end - 1].isdigit() else 3
            is_list = isinstance(self.modules[path], nn.ModuleList)  # blocks in stages: a list of lists
            if isinstance(parent, nn.ModuleList) and held <= 2 and not is_list:
                return path
        return None

    def _side(self, path: str) -> str:
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            return ""
        parts = path.split(".")
        return "decoder" if "decoder" in parts else "encoder" if "encoder" in parts else ""

    # -- leaf layers -----------------------------------------------------------------------------

    def _leaves(self) -> Iterator[ModuleSite]:
        heads = {id(m) for root in self._head_modules() for m in root.modules()}
        embeddings = self._called_embeddings()
        for name, module in self.modules.items():
            kind = layer_kind(module)
            if kind is None:
                continue
            block = self._inside.get(id(module))
            layer, side = (block.layer, block.side) if block else (None, "")
            parts, cross = self._leaf_parts(name, module, kind, block)
            if id(module) in heads:
                parts = [("head", None)]
            elif module in embeddings:
                parts = [("embedding", None)]
            for role, part in parts:
                yield ModuleSite(
                    name=f"{name}[{role}]" if part else name, module=module, role=role, layer=layer,
                    side=side, cross=cross, layer_kind=kind, part=part,
                )  # fmt: skip

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
                fused = fused_parts(leaf, attention, *_shape(module, kind))
                return [*fused] or [(alias(leaf, ATTENTION), None)], cross
            parent = path.rsplit(".", 1)[0]
            if "att" in parent.rsplit(".", 1)[-1].lower() and name.startswith(f"{parent}."):
                return [("output", None)], cross
        if leaf == "dense":
            return [("up" if name.split(".")[-2] == "intermediate" else "down", None)], False
        halves = gated_parts(leaf, _shape(module, kind)[0])
        return [*halves] or [(alias(leaf, FEED_FORWARD) or self._in_sequence(name), None)], False

    def _in_sequence(self, name: str) -> str:
        """Return the role of a layer of a feed-forward written as nn.Sequential: first up, last down."""
        path, _, leaf = name.rpartition(".")
        parent = self.modules[path]
        if not isinstance(parent, nn.Sequential):
            return ""
        linear = [n for n, m in parent.named_children() if layer_kind(m) == "linear"]
        return {linear[0]: "up", linear[-1]: "down"}.get(leaf, "") if len(linear) > 1 else ""

    def _head_modules(self) -> list[nn.Module]:
        model = self.model
        prefix = getattr(model, "base_model_prefix", "")
        found: list[nn.Module] = []
        if prefix and isinstance(getattr(model, prefix, None), nn.Module):
            found = [m for n, m in model.named_children() if n != prefix]
        getter: Any = getattr(model, "get_output_embeddings", None)
        output = None if getter is None else getter()
        return found + ([output] if output is not None and output not in found else [])

    def _embedding(self) -> nn.Module | None:
        try:
            found = self.model.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return None
        return found if isinstance(found, nn.Embedding) else None

    def _called_embeddings(self) -> list[nn.Module]:
        """Return the token embeddings that run. T5 keeps one beside its two stacks', tied, uncalled."""
        embedding = self._embedding()
        if embedding is None:
            return []
        others = [m for m in self.modules.values() if isinstance(m, nn.Embedding) and m is not embedding]
        tied: list[nn.Module] = [m for m in others if m.weight is embedding.weight]
        return tied or [embedding]

    # -- sublayers and attention -----------------------------------------------------------------

    def _sublayers(self, block: Block) -> Iterator[SublayerSite]:
        norms = [m for _, m in block.module.named_children() if layer_kind(m) == "norm"]
        for name, module, cross in block.attentions:
            first = norms[0] if norms and not cross else None
            role = "cross_attention" if cross else "attention"
            yield from self._sublayer(block, role, name, module, first, cross)
        for site in self.leaves:
            if site.layer == block.layer and site.role == "down" and self._inside[id(site.module)] is block:
                yield from self._ffn(block, site, norms[-1] if norms else None)

    def _ffn(self, block: Block, down: ModuleSite, norm: nn.Module | None) -> Iterator[SublayerSite]:
        path = down.name.split("[")[0].rsplit(".", 1)[0]
        module = self.modules[path]
        ups = (s for s in self.leaves if s.role == "up" and self._inside.get(id(s.module)) is block)
        up = next(ups, None)
        if path != block.name and not _is_post_norm(module):
            yield from self._sublayer(block, "ffn", path, module, norm, False)
        elif up is not None and path != block.name:
            tap = Tap(up.module, 0, "input")
            yield self._post_norm(block, "ffn", module, tap, up.in_features, False)
        elif up is not None and up.name.rsplit(".", 1)[0] == path:
            # BART writes both layers into the block: y is what the second gives, before the dropout.
            yield SublayerSite(
                name=self._named(block, "ffn"), module=down.module, role="ffn", layer=block.layer,
                side=block.side, features=up.in_features, x=Tap(up.module, 0, "input"),
            )  # fmt: skip

    def _sublayer(
        self, block: Block, role: str, name: str, module: nn.Module, norm: nn.Module | None, cross: bool
    ) -> Iterator[SublayerSite]:
        parent = self.modules[name.rsplit(".", 1)[0]]
        features = self._features_read(name)
        if not features:
            return
        beside = getattr(parent, "output", None)
        if parent is not block.module and isinstance(beside, nn.Module) and _is_post_norm(beside):
            yield self._post_norm(block, role, beside, Tap(module, 0, "hidden_states"), features, cross)
            return
        residual = Tap(norm, 0, "input") if norm is not None else None
        owner, dropout = module, getattr(parent, "dropout", None)
        if parent is not block.module and isinstance(dropout, nn.Module):
            residual, owner = Tap(parent, 0, "hidden_states"), dropout
        yield SublayerSite(
            name=self._named(block, role), module=owner, role=role, layer=block.layer, side=block.side,
            cross=cross, features=features, x=Tap(module, 0, "hidden_states"), residual=residual,
        )  # fmt: skip

    def _named(self, block: Block, role: str) -> str:
        """Return a name of the sublayer's own: ViT calls the attention module so, too."""
        name = f"{block.name}.{role}"
        return f"{name}[sublayer]" if name in self.modules else name

    def _post_norm(
        self, block: Block, role: str, output: nn.Module, x: Tap, features: int, cross: bool
    ) -> SublayerSite:
        norm = next(m for m in output.children() if layer_kind(m) == "norm")
        return SublayerSite(
            name=self._named(block, role), module=output.get_submodule("dropout"), role=role,
            layer=block.layer, side=block.side, cross=cross, features=features, x=x,
            residual=Tap(output, 1, "input_tensor"), norm=norm,
        )  # fmt: skip

    def _features_read(self, name: str) -> int:
        """Return how many features the first linear layer below a path reads; 0 if there is none."""
        return next((s.in_features for s in self.leaves if s.name.startswith(name + ".") and s.is_linear), 0)

    def _attention_sites(self) -> list[AttentionSite]:
        groups: dict[tuple[str, bool], list[AttentionSite]] = {}
        for block in self.blocks:
            for name, module, cross in block.attentions:
                site = self._attention(block, name, module, cross)
                if site is None:
                    continue
                group = groups.setdefault((site.side, site.cross), [])
                site.index = len(group)
                group.append(site)
        for group in groups.values():
            for site in group:
                site.count = len(group)
        return [site for group in groups.values() for site in group]

    def _attention(self, block: Block, name: str, module: nn.Module, cross: bool) -> AttentionSite | None:
        """Return the attention as a site if queries, keys and values have heads of one size."""
        by_role = {s.role: s for s in self.leaves if s.name.startswith(name + ".")}
        query, key, value = (by_role.get(role) for role in ("query", "key", "value"))
        if query is None or key is None or value is None or key.out_features != value.out_features:
            return None
        known = heads_of(module, query.out_features)
        if known and query.out_features * known[1] != key.out_features * known[0]:
            return None  # latent attention: its keys have a part that no layer of their own makes
        dim = of(module, DIMS) or query.out_features
        return AttentionSite(
            name=name, module=module, role="attention", layer=block.layer, side=block.side, cross=cross,
            features=query.in_features, heads=query.out_features // dim,
            kv_heads=key.out_features // dim, head_dim=dim,
        )  # fmt: skip


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by path, without those of adapters attached before."""
    own = {id(m) for deltas in model.modules() if isinstance(deltas, Deltas) for m in deltas.modules()}
    return {name: m for name, m in model.named_modules() if id(m) not in own}


def uses_attention_interface(module: nn.Module) -> bool:
    """Return whether the module's own file calls attention through transformers' interface."""
    source = sys.modules.get(type(module).__module__)
    return hasattr(source, "ALL_ATTENTION_FUNCTIONS") and hasattr(module, "config")


def layer_kind(module: nn.Module) -> str | None:
    """Return the kind of leaf layer `module` is, or None."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    name = type(module).__name__
    weight = module._parameters.get("weight")
    if name == "Conv1D" and weight is not None and weight.dim() == 2:
        return "conv1d"
    return "norm" if "Norm" in name and weight is not None and weight.dim() == 1 else None


def _shape(module: nn.Module, kind: str) -> tuple[int, int]:
    """Return (out, in) of a linear layer."""
    weight: Any = module.weight
    if kind == "conv1d":
        return int(weight.shape[1]), int(weight.shape[0])
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def _is_post_norm(module: nn.Module) -> bool:
    """Whether `module` is BERT's shape of output: dense, dropout, add, norm."""
    kinds = [layer_kind(m) for m in module.children()]
    return "norm" in kinds and "linear" in kinds and isinstance(getattr(module, "dropout", None), nn.Dropout)
