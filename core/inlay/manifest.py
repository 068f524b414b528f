"""The manifest `inlay.json`: read strictly and with bounds, because it may come from anyone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from inlay.errors import CheckpointError, shown

FILE = "inlay.json"
FORMAT = 1
MAX_BYTES = 16 << 20
MAX_PARTS, MAX_SITES, MAX_DEPTH, MAX_STRING, MAX_ITEMS = 64, 20_000, 16, 4096, 100_000
DO = "get the checkpoint again from whoever saved it"
MAX_METHODS, MAX_INT = 64, 2**63
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip
SHAPE = {
    "format": int, "parts": list, "base": dict, "tensors": str, "digest": str, "versions": dict,
}  # fmt: skip
PART = {
    "name": str, "method": str, "distribution": str, "version": str, "method_version": int, "seed": int,
    "settings": dict, "sites": list, "data": dict, "calibration": list,
}  # fmt: skip
DTYPED = {**PART, "dtype": str}  # a part that was attached in a dtype of its own
BASE = {"architecture": str, "config": str, "shapes": str, "weights": (str, NoneType), "left_out": list}


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
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        raise CheckpointError(
            "this checkpoint has a format this version does not read",
            saw=f"format {shown(manifest.get('format'))}, this inlay reads {FORMAT}",
            do="upgrade inlay",
        )
    _check_content(manifest)
    if manifest["digest"] != digest_of(manifest):
        raise damaged(f"{FILE} does not have the digest it names")
    return manifest  # type: ignore[no-any-return]


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return `content` as JSON gives it back, with its digest, after the checks that reading makes."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            "the adapter's settings or data cannot be written as JSON",
            saw=f"{type(error).__name__}: {error}",
            do="keep numbers, texts, lists and dicts of them in adapter.data",
        ) from error
    plain["digest"] = digest_of(plain)
    _bounded(plain, 0)
    _check_content(plain)
    return plain


def digest_of(content: dict[str, Any]) -> str:
    """Return the digest of a manifest, its own digest left out, whatever its layout."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_content(manifest: Any) -> None:
    """Raise unless a manifest holds what it should, of the right types and within bounds."""
    _check_shape(manifest, SHAPE, FILE)
    _check_shape(manifest["base"], BASE, "the base")
    _check_texts(manifest["base"]["left_out"], "tensors left out", MAX_ITEMS)
    if not 0 < len(manifest["parts"]) <= MAX_PARTS:
        raise damaged(f"{len(manifest['parts'])} parts, 1 to {MAX_PARTS} are read")
    for part in manifest["parts"]:
        _check_shape(part, DTYPED if isinstance(part, dict) and "dtype" in part else PART, "a part")
        if part.get("dtype", "float32") not in DTYPES:
            raise damaged(f"a part in the dtype {ascii(part['dtype'])[:100]}")
        _check_texts(part["sites"], "sites", MAX_SITES)
        _check_texts(part["calibration"], "calibration tensors", MAX_SITES)
        if not part["sites"]:
            raise damaged("a part without sites")


def _check_texts(values: list[Any], what: str, most: int) -> None:
    if len(values) > most or not all(isinstance(v, str) for v in values) or len({*values}) < len(values):
        raise damaged(f"{len(values):,} {what}: at most {most:,} different names are read")


def check_regular(path: Path, folder: Path) -> None:
    """Raise unless `path`, a checked name in `folder`, is a regular file: no link, pipe or device."""
    if not folder.is_dir():
        raise CheckpointError(
            "there is no such checkpoint folder", saw=ascii(str(folder)), do="check the path"
        )
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
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise damaged("an integer of more than 63 bits")
    if isinstance(value, (dict, list)):
        if len(value) > MAX_ITEMS:
            raise damaged(f"a list of {len(value):,} items")
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _bounded(item, depth + 1)


def _check_shape(value: Any, shape: Mapping[str, Any], what: str) -> None:
    if not isinstance(value, dict) or value.keys() != shape.keys():
        got = sorted(value)[:12] if isinstance(value, dict) else type(value).__name__
        raise damaged(f"{what} does not have the keys {sorted(shape)} but {ascii(got)[:300]}")
    for key, kind in shape.items():
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            wanted = getattr(kind, "__name__", "str")
            raise damaged(f"{what}: {key} is a {type(value[key]).__name__}, not a {wanted}")
