"""Refusing sizes that do not fit a layer, with those that would."""

from __future__ import annotations

from typing import Any

from inlay.authoring import ConfigError, Site


def check_most(name: str, value: int, most: int, where: str) -> None:
    """Refuse the setting `name` above `most`, the size of `where`."""
    if value > most:
        raise ConfigError(
            f"{name} is larger than what it is taken from",
            saw=f"{name}={value}; {where}",
            do=f"give at most {most}",
        )


def check_rank(method: Any, site: Site, most: int) -> None:
    """Refuse a rank above `most`."""
    check_most("rank", method.rank, most, shown(site))


def check_divides(name: str, size: int, site: Site, *sizes: int) -> None:
    """Refuse the setting `name`, which is `size`, where it does not divide each of `sizes`."""
    if any(n % size for n in sizes):
        raise ConfigError(
            f"{name} does not divide the layer",
            saw=f"{name}={size}; {shown(site)}",
            do=f"give one of {', '.join(map(str, divisors(*sizes)))}",
        )


def shown(site: Site) -> str:
    """Return a site with its sizes, in words."""
    return f"{site.name} is ({site.out_features}, {site.in_features})"


def divisors(*sizes: int) -> list[int]:
    """Return the numbers that divide every one of `sizes`, ascending."""
    return [n for n in range(1, min(sizes) + 1) if not any(size % n for size in sizes)]
