"""peft's two files, read strictly and written whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from inlay_peft_bridge.report import refused

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = "0.21.2"  # the version of peft whose format is written
MAX_CONFIG = 16 << 20
DO = "name a folder that peft's save_pretrained wrote"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the adapter's configuration."""
    path = _regular(folder / CONFIG)
    if path.stat().st_size > MAX_CONFIG:
        raise refused(f"{CONFIG} is too large", saw=f"{path.stat().st_size:,} bytes", do=DO)
    try:
        config = json.loads(path.read_bytes(), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise refused(f"{CONFIG} cannot be read", saw=ascii(str(error))[:200], do=DO) from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise refused(f"{CONFIG} does not say what kind of adapter it is", saw="no peft_type", do=DO)
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the adapter's tensors; a pickled file is not opened."""
    path = folder / TENSORS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise refused(
            "the adapter's tensors are a pickle, which could run code when it is opened",
            saw="adapter_model.bin",
            do="load it with peft, if you trust it, and save it again: it then writes safetensors",
        )
    try:
        tensors: dict[str, Tensor] = load_file(_regular(path))
    except (SafetensorError, OSError) as error:
        raise refused(f"{TENSORS} cannot be read", saw=ascii(str(error))[:200], do=DO) from error
    wrong = [n for n, t in tensors.items() if not (t.is_floating_point() and bool(t.isfinite().all()))]
    if wrong:
        raise refused("tensors of the adapter are not finite numbers", saw=ascii(wrong[:5]), do=DO)
    return tensors


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a file, from its header."""
    with safe_open(_regular(path), framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def check_new(folder: Path) -> None:
    """Raise unless a folder is new or empty."""
    if (folder.exists() or folder.is_symlink()) and not (folder.is_dir() and not any(folder.iterdir())):
        raise refused(
            "the output is not a new or empty folder",
            saw=ascii(str(folder)),
            do="choose another folder; nothing is overwritten",
        )


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files to a new or empty folder, which appears complete or not at all."""
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(plain, temporary / TENSORS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _regular(path: Path) -> Path:
    if path.is_symlink() or not path.is_file():
        raise refused("a file of the adapter is missing", saw=ascii(str(path)), do=DO)
    return path


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value
