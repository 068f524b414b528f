"""The manifest `inlay.json`: read strictly and with bounds, because it may come from anyone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from inlay.errors import CheckpointError

FILE = "inlay.json"
FORMAT = 1
MAX_BYTES = 16 << 20
MAX_PARTS, MAX_SITES, MAX_DEPTH, MAX_STRING, MAX_ITEMS = 64, 20_000, 16, 4096, 100_000
DO = "get the checkpoint again from whoever saved it"
SHAPE = {
    "format": int, "parts": list, "base": dict, "tensors": str, "digest": str, "seed": int, "versions": dict,
}  # fmt: skip
PART = {
    "name": str, "method": str, "distribution": str, "version": str, "method_version": int,
    "settings": dict, "sites": list, "data": dict, "calibration": list,
}  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint folder, checked in size, syntax, shape and bounds."""
    path = folder / FILE
    check_regular(path, folder)
    if path.stat().st_size > MAX_BYTES:
        raise damaged(f"{FILE} has {path.stat().st_size:,} bytes, at most {MAX_BYTES:,} are read")
    try:
        manifest = json.loads(
            path.read_bytes().decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant,
            parse_float=_finite,
        )  # fmt: skip
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise damaged(f"{FILE}: {ascii(str(error))[:200]}") from error
    _bounded(manifest, 0)
    _check_shape(manifest, SHAPE, FILE)
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            "this checkpoint has a format this version does not read",
            saw=f"format {manifest['format']}, this inlay reads {FORMAT}",
            do="upgrade inlay",
        )
    if not 0 < len(manifest["parts"]) <= MAX_PARTS:
        raise damaged(f"{len(manifest['parts'])} parts, 1 to {MAX_PARTS} are read")
    for part in manifest["parts"]:
        _check_shape(part, PART, "a part")
        if not 0 < len(part["sites"]) <= MAX_SITES or not all(isinstance(s, str) for s in part["sites"]):
            raise damaged(f"{len(part['sites'])} sites in a part")
    return manifest  # type: ignore[no-any-return]


def check_regular(path: Path, folder: Path) -> None:
    """Raise unless `path` is a regular file directly inside `folder` (no link, no way out)."""
    if path.parent != folder or path.name in ("", ".", "..") or "\\" in path.name or "/" in path.name:
        raise damaged(f"a file name leads out of the folder: {ascii(path.name)[:200]}")
    if not folder.is_dir():
        raise CheckpointError("there is no such checkpoint folder", saw=ascii(str(folder)), do="check the path")
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(
            "a file of the checkpoint is missing or not a regular file",
            saw=ascii(path.name)[:200],
            do="save it again with inlay.save, or check the path",
        )


def damaged(saw: str) -> CheckpointError:
    """Return the error for a checkpoint that no inlay has written like this."""
    return CheckpointError("the checkpoint is damaged or hostile", saw=saw, do=DO)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:50]!r} stands twice")
        found[key] = value
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not finite")
    return value


def _bounded(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise damaged(f"values nested deeper than {MAX_DEPTH}")
    if isinstance(value, str) and len(value) > MAX_STRING:
        raise damaged(f"a string of {len(value):,} characters")
    if isinstance(value, (dict, list)):
        if len(value) > MAX_ITEMS:
            raise damaged(f"a list of {len(value):,} items")
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _bounded(item, depth + 1)


def _check_shape(value: Any, shape: dict[str, type], what: str) -> None:
    if not isinstance(value, dict) or value.keys() != shape.keys():
        got = sorted(value)[:12] if isinstance(value, dict) else type(value).__name__
        raise damaged(f"{what} does not have the keys {sorted(shape)} but {ascii(got)[:300]}")
    for key, kind in shape.items():
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise damaged(f"{what}: {key} is a {type(value[key]).__name__}, not a {kind.__name__}")
