"""Corrections: what a user, or a package for an architecture, says of roles that structure does not."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from inlay.errors import ConfigError, RegistryError, near, shown
from inlay.packages import state_of_path
from inlay.sites import Slice

Role = str | Mapping[str, int]  # a role, or those of consecutive slices of outputs and their sizes
GROUP, KEPT = "inlay.architectures", "_inlay_roles"
LEAF_ROLES = ("query", "key", "value", "output", "gate", "up", "down", "norm", "embedding", "pooler",
              "head", "")  # fmt: skip


def matches(name: str, pattern: str) -> bool:
    """Whether a module path is meant: exactly, by its last components, or by a glob on the whole path."""
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def told(model: nn.Module, names: list[str]) -> dict[str, Role]:
    """Return the roles that are said for modules called `names`: the user's above a package's."""
    rules = {**described(model), **model.__dict__.get(KEPT, {})}
    return {name: role for pattern, role in rules.items() for name in names if matches(name, pattern)}


def described(model: nn.Module) -> dict[str, Role]:
    """Return what installed packages say about the model's type: entry points in `inlay.architectures`."""
    kind = getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__
    offers = _offered(kind, state_of_path())
    if len(offers) > 1:
        raise RegistryError(
            f"the architecture {kind!r} is described more than once",
            saw=", ".join(sorted(e.value for e in offers)),
            do="uninstall one of these packages",
        )
    return checked(offers[0].load(), offers[0].value) if offers else {}


@lru_cache(maxsize=8)
def _offered(kind: str, path: Any) -> list[EntryPoint]:
    """Return the descriptions that packages offer for a type, read once while `path` stays as it is."""
    return list({(e.value, e.name): e for e in entry_points(group=GROUP, name=kind)}.values())


def checked(roles: Any, source: str) -> dict[str, Role]:
    """Return a mapping from patterns of module names to roles, or raise."""
    if not isinstance(roles, Mapping):
        raise ConfigError(
            "roles are told as a mapping", saw=f"{source}: {shown(roles)}", do='{"*.w_in": "up", …}'
        )
    for pattern, role in roles.items():
        words = list(role) if isinstance(role, Mapping) else [role]
        sizes = list(role.values()) if isinstance(role, Mapping) else [1]
        unknown = [w for w in words if w not in (*LEAF_ROLES, "attention")]
        if unknown or not isinstance(pattern, str):
            raise ConfigError(
                f"{shown(unknown[0] if unknown else pattern)} is no role a layer can be told to have",
                saw=f"{source}: {shown(pattern)}",
                do=near(unknown[0] if unknown else "", (*LEAF_ROLES[:-1], "attention")),
            )
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ConfigError(
                "slices are told by their number of outputs",
                saw=f"{source}: {shown(pattern)}: {shown(role)}",
                do='{"*.wqkv": {"query": 64, "key": 16, "value": 16}}',
            )
    return dict(roles)


def parts_of(name: str, role: Role, rows: int) -> list[tuple[str, Slice | None]]:
    """Return the parts of a layer with `rows` outputs that a correction names."""
    if isinstance(role, str):
        return [(role, None)]
    if sum(role.values()) != rows:
        raise ConfigError(
            "the slices do not make up the layer",
            saw=f"{name} has {rows} outputs, the slices told have {sum(role.values())}",
            do="tell the sizes of all its slices, in the order of its outputs",
        )
    ends = [sum(list(role.values())[: i + 1]) for i in range(len(role))]
    return [(word, Slice(end - size, end)) for (word, size), end in zip(role.items(), ends, strict=True)]


def remember(model: nn.Module, roles: Mapping[str, Role], names: list[str]) -> None:
    """Keep the user's corrections with the model; raise, and keep nothing, if one names no module."""
    checked(roles, "override")
    for pattern in roles:
        if not any(matches(name, pattern) for name in names):
            raise ConfigError(
                f"a correction names no module of this {type(model).__name__}",
                saw=shown(pattern),
                do=near(pattern, names),
            )
    model.__dict__[KEPT] = {**model.__dict__.get(KEPT, {}), **roles}
