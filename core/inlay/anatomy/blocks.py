"""Blocks: the elements of the lists that a model repeats its attentions and feed-forwards in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

CROSS = ("cross", "encdec", "encoder_attn", "multihead_attn")
NAMED = "transformer_blocks"  # what says by its name that it is a list of blocks
Modules = Mapping[str, nn.Module]


@dataclass
class Block:
    """One transformer block and what was found in it."""

    name: str
    module: nn.Module
    layer: int
    side: str
    attentions: list[tuple[str, nn.Module, bool]] = field(default_factory=list)  # name, module, cross
    whole: bool = True  # whether a call of it is the block's: XLM keeps its parts in lists of their own


def find_blocks(modules: Modules, attentions: Collection[str], two_sided: bool) -> list[Block]:
    """Return the elements of every list that holds attentions: in hybrids not each has one.

    `two_sided` says whether the model has an encoder and a decoder.
    """
    paths = {name: path for name in attentions if (path := _block_path(modules, name, attentions))}
    blocks: dict[str, Block] = {}
    for owner in dict.fromkeys(path.rpartition(".")[0] for path in paths.values()):
        for held in _lists_beside(modules, owner, attentions):
            whole = held == owner and _joined(owner, "0") not in attentions
            for number, (key, _) in enumerate(modules[held].named_children()):
                path = _joined(held, key)
                if path in modules:
                    side = _side(path) if two_sided else ""
                    blocks[path] = Block(path, modules[path], number, side, whole=whole)
    for name, path in paths.items():
        module = modules[name]
        cross = any(word in name[len(path) :].lower() for word in CROSS)
        cross = cross or getattr(module, "is_cross_attention", False) is True
        blocks[path].attentions.append((name, module, cross))
    return list(blocks.values())


def _block_path(modules: Modules, name: str, attentions: Collection[str]) -> str | None:
    """Return the outermost list element, `name` itself or above it, that holds at most two attentions.

    Or the element of a list that says by its name what it holds.
    """
    parts = name.split(".")
    if NAMED in parts:  # a U-Net's lists hold stages of such lists
        return ".".join(parts[: parts.index(NAMED) + 2])
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        parent = modules[".".join(parts[: end - 1])]
        held = sum(f"{a}.".startswith(path + ".") for a in attentions) if parts[end - 1].isdigit() else 3
        is_list = isinstance(modules[path], nn.ModuleList)  # blocks in stages: a list of lists
        if isinstance(parent, nn.ModuleList | nn.Sequential) and held <= 2 and not is_list:
            return path
    return None


def _lists_beside(modules: Modules, owner: str, attentions: Collection[str]) -> list[str]:
    """Return a list of blocks; of attentions alone, with those beside it that are as long (XLM)."""
    if not owner or _joined(owner, "0") not in attentions:
        return [owner]
    above, _, own = owner.rpartition(".")
    beside = {n: m for n, m in modules[above].named_children() if isinstance(m, nn.ModuleList)}
    return [_joined(above, n) for n, m in beside.items() if len(m) == len(beside[own])]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")


def _side(path: str) -> str:
    parts = path.split(".")
    return "decoder" if "decoder" in parts else "encoder" if "encoder" in parts else ""
