"""Sublayers and attentions of the blocks: what they read and give, in whatever modules they lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from inlay.anatomy.blocks import Block
from inlay.anatomy.kinds import layer_kind
from inlay.anatomy.roles import DIMS, heads_of, of
from inlay.sites import AttentionSite, ModuleSite, SublayerSite, Tap

if TYPE_CHECKING:
    from inlay.anatomy import Anatomy


class Sublayers:
    """The sublayers of one block."""

    def __init__(self, anatomy: Anatomy, block: Block, leaves: list[ModuleSite]) -> None:
        self.modules, self.block, self.leaves = anatomy.modules, block, leaves
        self.named: dict[str, int] = {}  # how many there are of a name: of most roles one

    def __iter__(self) -> Iterator[SublayerSite]:
        block = self.block
        norms = [m for _, m in block.module.named_children() if layer_kind(m) == "norm"]
        if getattr(block.module, "norm_first", True) is False:
            norms = []  # torch's layers say where their norms stand: here after the residual is added
        for name, module, cross in block.attentions:
            first = norms[0] if norms and not cross else None
            yield from self.around("cross_attention" if cross else "attention", name, module, first, cross)
        for path, down in {self.whole(s): s for s in self.leaves if s.role == "down"}.items():
            yield from self.ffn(path, down, norms[-1] if norms else None)

    def whole(self, down: ModuleSite) -> str:
        """Return the path of the feed-forward a down-projection is part of: of all experts' together."""
        path = down.name.split("[")[0].rpartition(".")[0]
        parts = path.split(".")
        if "experts" in parts:
            return ".".join(parts[: parts.index("experts")])
        above = path.rpartition(".")[0]
        listed = isinstance(self.modules[path], nn.ModuleList)  # which is not called
        return above if listed or f"{above}.experts" in self.modules else path

    def ffn(self, path: str, down: ModuleSite, norm: nn.Module | None) -> Iterator[SublayerSite]:
        module = self.modules[path]
        up = next((s for s in self.leaves if s.role == "up"), None)
        if path != self.block.name and not _is_post_norm(module):
            yield from self.around("ffn", path, module, norm, False)
        elif up is not None and path != self.block.name:
            yield self.post_norm("ffn", module, Tap(up.module, 0, "input"), up.in_features, False)
        elif up is not None and up.name.rsplit(".", 1)[0] == path:
            # BART writes both layers into the block: y is what the second gives, before the dropout.
            tap = Tap(up.module, 0, "input")
            yield self.site("ffn", down.module, tap, up.in_features, None, False)

    def around(
        self, role: str, name: str, module: nn.Module, norm: nn.Module | None, cross: bool
    ) -> Iterator[SublayerSite]:
        """Give the sublayer that `module`, called `name`, is, or is the heart of."""
        parent = self.modules[name.rpartition(".")[0]]
        features = next((s.in_features for s in self.leaves if _within(s, name) and s.is_linear), 0)
        if not features:
            return
        x, inner = Tap(module, 0, "hidden_states"), parent is not self.block.module
        beside, dropout = getattr(parent, "output", None), getattr(parent, "dropout", None)
        if inner and isinstance(beside, nn.Module) and _is_post_norm(beside):
            yield self.post_norm(role, beside, x, features, cross)
        elif inner and isinstance(dropout, nn.Module):
            yield self.site(role, dropout, x, features, Tap(parent, 0, "hidden_states"), cross)
        else:
            residual = Tap(norm, 0, "input") if norm is not None else None
            yield self.site(role, module, x, features, residual, cross)

    def post_norm(self, role: str, output: nn.Module, x: Tap, features: int, cross: bool) -> SublayerSite:
        """Return a sublayer that ends as BERT's do: dense, dropout, add, norm."""
        residual = Tap(output, 1, "input_tensor")
        site = self.site(role, output.get_submodule("dropout"), x, features, residual, cross)
        site.norm = next(m for m in output.children() if layer_kind(m) == "norm")
        return site

    def site(
        self, role: str, module: nn.Module, x: Tap, features: int, residual: Tap | None, cross: bool
    ) -> SublayerSite:
        return SublayerSite(
            name=self.name(role), module=module, role=role, layer=self.block.layer, side=self.block.side,
            cross=cross, features=features, x=x, residual=residual,
        )  # fmt: skip

    def name(self, role: str) -> str:
        """Return a name of the sublayer's own: ViT calls the attention module so, too."""
        name = f"{self.block.name}.{role}"
        name = f"{name}[sublayer]" if name in self.modules else name
        count = self.named[name] = self.named.get(name, 0) + 1
        return name if count == 1 else f"{name}[{count}]"


def attention_sites(anatomy: Anatomy) -> list[AttentionSite]:
    """Return the attentions that keys and values can be added to, numbered among their like."""
    groups: dict[tuple[str, bool], list[AttentionSite]] = {}
    for block in anatomy.blocks:
        for name, module, cross in block.attentions:
            site = _attention(anatomy.inside(block), block, name, module, cross)
            if site is not None:
                group = groups.setdefault((site.side, site.cross), [])
                site.index = len(group)
                group.append(site)
    for group in groups.values():
        for site in group:
            site.count = len(group)
    return [site for group in groups.values() for site in group]


def _attention(
    leaves: list[ModuleSite], block: Block, name: str, module: nn.Module, cross: bool
) -> AttentionSite | None:
    """Return the attention as a site if queries, keys and values have heads of one size."""
    by_role = {s.role: s for s in leaves if _within(s, name)}
    query, key, value = (by_role.get(role) for role in ("query", "key", "value"))
    if query is None or key is None or value is None or key.out_features != value.out_features:
        return None
    known = heads_of(module, query.out_features)
    if known and query.out_features * known[1] != key.out_features * known[0]:
        return None  # latent attention: its keys have a part that no layer of their own makes
    dim = of(module, DIMS) or (known[2] if known else query.out_features)
    return AttentionSite(
        name=name, module=module, role="attention", layer=block.layer, side=block.side, cross=cross,
        features=query.in_features, heads=query.out_features // dim,
        kv_heads=key.out_features // dim, head_dim=dim,
    )  # fmt: skip


def _within(site: ModuleSite, name: str) -> bool:
    """Whether a layer is below the module called `name`, or a part of it."""
    return site.name.startswith((f"{name}.", f"{name}["))


def _is_post_norm(module: nn.Module) -> bool:
    """Whether `module` is BERT's shape of output: dense, dropout, add, norm."""
    kinds = [layer_kind(m) for m in module.children()]
    return "norm" in kinds and "linear" in kinds and isinstance(getattr(module, "dropout", None), nn.Dropout)
