"""Settings that may differ by role: one value for all sites, or a mapping from roles and names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from inlay.anatomy import ROLES
from inlay.anatomy.corrections import matches
from inlay.errors import ConfigError, near, shown
from inlay.sites import Site
from inlay.targets import INSIDE, split_side

DEFAULT = "default"


def by_site(method: str, what: str, value: Any, sites: Sequence[Site]) -> list[Any]:
    """Return the value of a setting at each site; `method` and `what` name it in errors.

    A mapping's keys are those of `targets`, and "default". The closest holds: a module's name before
    "encoder.query", that before "query", that before "attention" or "ffn", that before "linear". Raise
    if a site is left out, if two keys are as close and differ, or if a key means none of the sites.
    """
    if not isinstance(value, Mapping):
        return [value] * len(sites)
    meant = [_closest(method, what, value, site) for site in sites]
    used = {key for site in sites for key, _ in _meaning(value, site)} | {DEFAULT}
    if idle := [key for key in value if key not in used]:
        raise ConfigError(
            f"{method}: {what} names something that is no target",
            saw=f"{shown(idle[0])}: {value[idle[0]]}; targets are {_some(sites)}",
            do=near(idle[0], {s.role for s in sites if s.role} | {DEFAULT}),
        )
    return meant


def _closest(method: str, what: str, value: Mapping[str, Any], site: Site) -> Any:
    found = sorted(_meaning(value, site), key=lambda item: item[1])
    if not found:
        role = f", a {site.role}" if site.role else ""
        raise ConfigError(
            f"{method}: {what} says nothing of a target",
            saw=f"{site.name}{role}; {what} names {', '.join(map(repr, value))}",
            do=f'add its role, its name, or "{DEFAULT}" for whatever is not named',
        )
    best = [key for key, distance in found if distance == found[0][1]]
    if len({value[key] for key in best}) > 1:
        raise ConfigError(
            f"{method}: {what} is ambiguous",
            saw=f"{site.name} is meant by {' and by '.join(f'{k!r}: {value[k]}' for k in best[:2])}",
            do="leave one of them out, or say it by the whole name",
        )
    return value[best[0]]


def _meaning(value: Mapping[str, Any], site: Site) -> Iterator[tuple[str, int]]:
    """Yield the keys that mean a site, with how far they are from naming it alone."""
    for key in value:
        distance = _distance(key, site)
        if distance is not None:
            yield key, distance


def _distance(key: str, site: Site) -> int | None:
    if key == DEFAULT:
        return 9
    side, role = split_side(key)
    if role not in ROLES:
        if key in (site.name, site.name.partition("[")[0]):
            return 0 if key == site.name else 1
        return 2 if matches(site.name, key) or matches(site.name.partition("[")[0], key) else None
    if side not in ("", "both", site.side) or site.role not in (role, *INSIDE.get(role, ())):
        return None
    return 3 + (side in ("", "both")) + (0 if site.role == role else 4 if role == "linear" else 2)


def _some(sites: Sequence[Site]) -> str:
    names = list(dict.fromkeys(site.role or site.name for site in sites))
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
