"""Sizes that a layer cannot have, refused with those it could."""

from __future__ import annotations

from inlay.authoring import ConfigError, Site


def divisors(*sizes: int) -> list[int]:
    """Return the numbers that divide every one of `sizes`, ascending."""
    return [n for n in range(1, min(sizes) + 1) if not any(size % n for size in sizes)]


def sized(site: Site) -> str:
    """Return a site's name and size, for an error."""
    return f"{site.name} (in {site.in_features}, out {site.out_features})"


def need_divisor(method: str, name: str, value: int, site: Site) -> None:
    """Raise unless `value`, the setting `name`, divides the layer's in and out."""
    if site.in_features % value or site.out_features % value:
        fitting = ", ".join(map(str, divisors(site.in_features, site.out_features)))
        raise ConfigError(
            f"{method}: {name} does not divide the layer's sizes",
            saw=f"{name}={value} at {sized(site)}",
            do=f"take one that divides both: {fitting}; or other targets",
        )


def need_rank(method: str, name: str, value: int, site: Site) -> None:
    """Raise if `value`, the setting `name`, is more than the layer's rank can be."""
    most = min(site.in_features, site.out_features)
    if value > most:
        raise ConfigError(
            f"{method}: {name} is larger than the layer",
            saw=f"{name}={value} at {sized(site)}",
            do=f"take at most {most}, or other targets",
        )
