"""The anatomy of a model as text: its modules as a tree, with the role found for each beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from inlay.sites import ModuleSite

if TYPE_CHECKING:
    from inlay.anatomy import Anatomy

Line = tuple[int, str, str, str]  # depth, name, what it is, role


def drawn(anatomy: Anatomy) -> str:
    """Return the tree; equal neighbours in a list (blocks, experts) are written once."""
    lines = list(_lines(anatomy, "", Roles(anatomy), 0))
    name = max(2 * depth + len(word) for depth, word, _, _ in lines) + 2
    kind = max(len(text) for _, _, text, _ in lines) + 2
    return "\n".join(
        f"{'  ' * depth + word:{name}}{text:{kind}}{role}".rstrip() for depth, word, text, role in lines
    )


class Roles:
    """What stands beside each module in the tree."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.leaves: dict[str, list[ModuleSite]] = {}
        for site in anatomy.leaves:
            self.leaves.setdefault(site.name.split("[")[0], []).append(site)
        self.others = {s.name: f"block {s.layer}" for s in anatomy.block_sites()}
        for sublayer in anatomy.sublayers:
            at = anatomy.names.get(sublayer.module, "")
            self.others.setdefault(at, f"{sublayer.role}, as a sublayer: its output")
        for attention in anatomy.attentions:
            shared = "" if attention.kv_heads == attention.heads else f", {attention.kv_heads} for keys"
            word = "cross_attention" if attention.cross else "attention"
            self.others[attention.name] = f"{word}: {attention.heads} heads of {attention.head_dim}{shared}"

    def of(self, name: str) -> str:
        sites = self.leaves.get(name, [])
        if not sites:
            return self.others.get(name, "")
        if sites[0].expert is not None:
            roles, count = dict.fromkeys(s.role for s in sites), 1 + (sites[-1].expert or 0)
            return f"{', '.join(roles)} of {count} experts"
        return " · ".join(f"{s.role} {_rows(s)}".strip() for s in sites)


def _rows(site: ModuleSite) -> str:
    if site.part is None:
        return ""
    each = "" if site.part.groups == 1 else f" of each {site.part.groups}th"
    return f"[{site.part.start}:{site.part.stop}{each}]"


def _lines(anatomy: Anatomy, path: str, roles: Roles, depth: int) -> Iterator[Line]:
    module = anatomy.modules[path]
    word = path.rpartition(".")[2] or type(module).__name__
    yield depth, word, _what(anatomy, path) if path else "", roles.of(path)
    before: list[Line] = []
    repeated: list[str] = []
    for name, _ in module.named_children():
        inside = f"{path}.{name}".lstrip(".")
        if inside not in anatomy.modules:
            continue
        lines = list(_lines(anatomy, inside, roles, depth + 1))
        if name.isdigit() and before and _alike(lines, before):
            repeated.append(name)
            continue
        yield from _together(before, repeated)
        before, repeated = lines, [name]
    yield from _together(before, repeated)


def _together(lines: list[Line], names: list[str]) -> list[Line]:
    """Return the lines of equal elements of a list, headed by the first and last number."""
    if len(names) < 2:
        return lines
    depth, _, what, role = lines[0]
    role = role.split(" ")[0] if role.startswith("block") else role
    return [(depth, f"{names[0]} to {names[-1]}", what, role), *lines[1:]]


def _alike(lines: list[Line], others: list[Line]) -> bool:
    return len(lines) == len(others) and lines[0][2] == others[0][2] and lines[1:] == others[1:]


def _what(anatomy: Anatomy, path: str) -> str:
    module = anatomy.modules[path]
    site = anatomy.leaf(path, module)
    kind = type(module).__name__
    if site is None:
        return kind
    return f"{kind} {f'{site.in_features} → ' if site.is_linear else ''}{site.out_features}"
