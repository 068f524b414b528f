"""Targets: the user's selection, resolved to sites. Every entry must match something."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from inlay.anatomy import ROLES, Anatomy, sequence
from inlay.anatomy.corrections import matches
from inlay.errors import TargetError, near, shown
from inlay.method import Method
from inlay.sites import ModuleSite, Site

PIECE = re.compile(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?")  # a model has at most thousands of blocks
SIDED = ("query", "key", "value", "output", "gate", "up", "down", "attention", "ffn")
SIDES = ("encoder", "decoder", "both")
INSIDE = {
    "attention": ("query", "key", "value", "output"),
    "ffn": ("gate", "up", "down"),
    "linear": ("query", "key", "value", "output", "gate", "up", "down"),
}


def resolve(anatomy: Anatomy, method: Method) -> tuple[Site, ...]:
    """Return the sites a method goes to, in model order, each once."""
    if method.parts():
        inner = {s.name: s for part in method.inside().values() for s in resolve(anatomy, part)}
        return _in_model_order(anatomy, list(inner.values()))
    if method.targets is None and method.optional_targets:
        return _in_model_order(anatomy, _in_layers(_defaults(anatomy, method), method))
    entries = method.default_targets if method.targets is None else method.targets
    if not entries:
        raise TargetError(f"{method.id} has no targets", saw="targets=()", do="name roles or modules")
    found: dict[str, Site] = {}
    for entry in entries:
        for site in _matches(anatomy, method, entry):
            found[site.name] = site
    return _in_model_order(anatomy, _in_layers(list(found.values()), method))


def among(model: nn.Module, sites: Sequence[Site], method: Method) -> tuple[Site, ...]:
    """Return those of `sites` that a method inside another goes to."""
    names = {site.name for site in resolve(Anatomy(model), method)}
    return tuple(site for site in sites if site.name in names)


def _defaults(anatomy: Anatomy, method: Method) -> list[Site]:
    """Return the sites of the method's own defaults; of the optional ones, those the model has."""
    found = {s.name: s for entry in method.default_targets for s in _matches(anatomy, method, entry)}
    refused: list[TargetError] = []
    for entry in method.optional_targets:
        try:
            found.update({s.name: s for s in _matches(anatomy, method, entry)})
        except TargetError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return list(found.values())


def _in_model_order(anatomy: Anatomy, sites: list[Site]) -> tuple[Site, ...]:
    order = {name: i for i, name in enumerate(anatomy.modules)}
    return tuple(sorted(sites, key=lambda s: order.get(s.name.split("[")[0], -1)))


def layer_numbers(layers: Sequence[int] | str) -> set[int]:
    """Return the layer indices meant by [0, 1, 5] or "0-5,11"."""
    if not isinstance(layers, str):
        return set(layers)
    numbers: set[int] = set()
    for piece in layers.split(","):
        found = PIECE.fullmatch(piece)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise TargetError(
                "the layers cannot be read", saw=shown(layers), do='write for example layers="0-5,11"'
            )
        numbers |= set(range(first, last + 1))
    return numbers


def _matches(anatomy: Anatomy, method: Method, entry: str) -> list[Site]:
    side, role = split_side(entry)
    found = _by_role(anatomy, method, role) if role in ROLES else _by_name(anatomy, method, entry)
    found = [site for site in found if side in ("", "both", site.side)]
    if not found:
        raise _nothing(anatomy, method, entry)
    if not side and role in SIDED and role in (method.targets or ()):
        _check_one_side(anatomy, role, found)
    suiting = [site for site in found if method.suits(site)]
    if not suiting:
        raise TargetError(
            f"{method.id} does not suit what {entry!r} names",
            saw=f"{len(found)} sites such as {found[0].name} ({found[0].kind})",
            do=method.unsuited(),
        )
    return suiting


def split_side(entry: str) -> tuple[str, str]:
    """Return ("encoder", "query") of "encoder.query"; of any other entry ("", entry)."""
    side, _, role = entry.partition(".")
    return (side, role) if side in SIDES and role in ROLES else ("", entry)


def _check_one_side(anatomy: Anatomy, role: str, found: Sequence[Site]) -> None:
    """Raise if a role that the user named is there in an encoder and in a decoder: which is meant?"""
    count = {side: sum(site.side == side for site in found) for side in ("encoder", "decoder")}
    if all(count.values()):
        raise TargetError(
            f"{role!r} is in the encoder and in the decoder of this {anatomy.family}",
            saw=f"{count['encoder']} in the encoder, {count['decoder']} in the decoder",
            do=f'say which: "encoder.{role}", "decoder.{role}" or "both.{role}"',
        )


def _by_role(anatomy: Anatomy, method: Method, role: str) -> list[Site]:
    accepts = method.accepts
    if "sequence" in accepts:
        return list(sequence.by_default(anatomy)) if role == "embedding" else []
    if "attention" in accepts and role in ("attention", "cross_attention"):
        return [s for s in anatomy.attentions if role == "attention" or s.cross]
    if "sublayer" in accepts and role in ("attention", "ffn", "cross_attention"):
        return [s for s in anatomy.sublayers if s.role == role]
    if role == "block":
        return list(anatomy.block_sites()) if "block" in accepts else []
    if role == "head" and "parameter" in accepts:
        return _everything_under(anatomy, [s.module for s in anatomy.leaves if s.role == "head"])
    roles = INSIDE.get(role.removeprefix("cross_"), (role,))
    cross = role == "cross_attention"
    return [s for s in anatomy.leaves if s.role in roles and s.kind in accepts and (s.cross or not cross)]


def _everything_under(anatomy: Anatomy, modules: Iterable[object]) -> list[Site]:
    sites: dict[str, Site] = {}
    for module in modules:
        for site in anatomy.parameters_under(module):  # type: ignore[arg-type]
            sites[site.name] = site
    return list(sites.values())


def _by_name(anatomy: Anatomy, method: Method, pattern: str) -> list[Site]:
    names = [n for n in anatomy.modules if n and matches(n, pattern)]
    found: list[Site] = [
        s for s in anatomy.leaves
        if s.kind in method.accepts and (s.name == pattern or _meant(anatomy, s, pattern))
    ]  # fmt: skip
    for name in names:
        found += _named(anatomy, method, name)
    if "attention" not in method.accepts and "sublayer" not in method.accepts and pattern == "":
        found += _named(anatomy, method, "")
    return found


def _named(anatomy: Anatomy, method: Method, name: str) -> list[Site]:
    """Return the sites that the module called `name` gives this method."""
    module, accepts = anatomy.modules[name], method.accepts
    special: list[Site] = [*anatomy.attentions, *anatomy.sublayers, *anatomy.block_sites()]
    special += anatomy.sequence_sites() if "sequence" in accepts else []
    hits: list[Site] = [
        s for s in special
        if s.kind in accepts and module in (s.module, getattr(getattr(s, "x", None), "module", None))
    ]  # fmt: skip
    leaf = anatomy.leaf(name, module)
    if leaf is not None and leaf.kind in accepts:
        hits.append(leaf)
    elif leaf is None and not hits and "parameter" in accepts:
        hits += anatomy.parameters_under(module)
    return hits


def _meant(anatomy: Anatomy, site: ModuleSite, pattern: str) -> bool:
    """Whether a pattern names the module of several layers that a site is in, or the tensor of its matrix."""
    if site.expert is None and not site.by_weight:
        return False
    layer = anatomy.names[site.module]
    return matches(layer, pattern) or matches(f"{layer}.{site.weight_name}", pattern)


def _in_layers(sites: list[Site], method: Method) -> list[Site]:
    if method.layers is None:
        return sites
    wanted = layer_numbers(method.layers)
    if not wanted:
        raise TargetError(f"{method.id} has no layers", saw="layers=()", do="name some, or leave layers out")
    there = {s.layer for s in sites if s.layer is not None}
    missing = sorted(wanted - there)
    if missing:
        raise TargetError(
            f"{method.id}: layers name blocks this model lacks",
            saw=f"layers {missing[:12]}; it has {min(there, default='none')} to {max(there, default='none')}",
            do="leave those layers out",
        )
    return [s for s in sites if s.layer in wanted]


def _nothing(anatomy: Anatomy, method: Method, entry: str) -> TargetError:
    accepts = ", ".join(sorted(method.accepts))
    if entry in ROLES and "sequence" in method.accepts and (reasons := sequence.find(anatomy)[1]):
        return TargetError(
            f"virtual tokens cannot enter this {anatomy.family}",
            saw="; ".join(reasons),
            do="choose prefix_tuning, whose keys and values have no positions, or lora",
        )
    if unsplit := anatomy.unsplit() if entry in ("query", "key", "value") else []:
        return TargetError(
            f"the slices of a fused projection are not known, so {method.id} cannot tell its {entry!r}",
            saw=unsplit[0],
            do='say them: inlay.anatomy(model).override({"*.qkv": {"query": …, "key": …, "value": …}})',
        )
    if entry in ROLES:
        have = [role for role in ROLES if _by_role(anatomy, method, role)]
        return TargetError(
            f"this {anatomy.family} has no {entry!r} that {method.id} could act on",
            saw=f"roles found here: {', '.join(have) or 'none'}; {method.id} acts on: {accepts}",
            do="choose among those roles, or name modules as in [n for n, _ in model.named_modules()]",
        )
    hit = [n for n in anatomy.modules if n and matches(n, entry)]
    if hit:
        kinds = sorted({type(anatomy.modules[n]).__name__ for n in hit})
        return TargetError(
            f"the target {entry!r} names modules that {method.id} cannot act on",
            saw=f"{hit[0]} and {len(hit) - 1} more: {', '.join(kinds)}",
            do=f"{method.id} acts on: {accepts}",
        )
    last = {n.rsplit(".", 1)[-1] for n in anatomy.modules if n} | set(ROLES)
    return TargetError(
        f"the target {entry!r} matches nothing in this {anatomy.family}",
        saw=f"{len(anatomy.modules)} modules, none called so",
        do=near(entry.rsplit(".", 1)[-1], last),
    )


def by_name(anatomy: Anatomy, method: Method, names: Sequence[str]) -> tuple[Site, ...]:
    """Return the sites with exactly these names, as a checkpoint lists them."""
    known: dict[str, Site] = {}
    everything: list[Site] = [*anatomy.sublayers, *anatomy.attentions, *anatomy.block_sites(),
                              *anatomy.sequence_sites(), *anatomy.leaves]  # fmt: skip
    for site in everything:
        if site.kind in method.accepts:
            known.setdefault(site.name, site)
    return tuple(known.get(name) or _bare(anatomy, method, name) for name in names)


def _bare(anatomy: Anatomy, method: Method, name: str) -> Site:
    """Return a site known by its path alone: a leaf without a role, or a bare tensor."""
    module = anatomy.modules.get(name)
    site = None if module is None else anatomy.leaf(name, module)
    if site is None:
        owner = anatomy.modules.get(name.rpartition(".")[0])
        options: list[ModuleSite] = [] if owner is None else anatomy.parameters_under(owner)
        site = next((s for s in options if s.name == name), None)
    if site is None or site.kind not in method.accepts:
        raise TargetError(
            f"this {anatomy.family} has no site {ascii(name)[:200]}",
            saw=f"{len(anatomy.modules)} modules",
            do=near(name, anatomy.modules),
        )
    return site
