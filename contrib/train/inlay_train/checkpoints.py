"""What a checkpoint folder holds, read as strictly as loading reads it, without its methods' packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import inlay
from inlay import tensorfile
from inlay.checkpoint import CALIBRATION
from inlay.errors import CheckpointError
from inlay.manifest import FILE, damaged, read_manifest
from inlay.settings import is_method
from inlay_train.known import known

PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Needed:
    """A method that a part needs: `installed` is the version here, `install` what would bring it."""

    method: str
    package: str
    version: str
    installed: str | None
    install: str | None


@dataclass(frozen=True)
class SavedPart:
    """One part of a saved stack."""

    name: str
    method: str
    settings: dict[str, Any]
    sites: list[str]
    shapes: dict[str, list[int]]
    parameters: int
    bytes: int
    needs: list[Needed]


@dataclass(frozen=True)
class Saved:
    """A checkpoint: its parts in order, the base it was made for, and who wrote it."""

    folder: str
    format: int
    digest: str
    base: dict[str, Any]
    versions: dict[str, str]
    parts: list[SavedPart]

    @property
    def missing(self) -> list[Needed]:
        """The methods that are not installed here, each once."""
        return list(dict.fromkeys(n for part in self.parts for n in part.needs if n.installed is None))

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def read(folder: Path) -> Saved:
    """Return what the folder holds; raise `CheckpointError` where loading would, methods aside."""
    _check_place(folder)
    manifest = read_manifest(folder)
    with tensorfile.opened(folder, manifest["tensors"]) as file:
        stored = tensorfile.by_part(file, len(manifest["parts"]))
        parts = [_part(entry, file, keys) for entry, keys in zip(manifest["parts"], stored, strict=True)]
    return Saved(
        str(folder), manifest["format"], manifest["digest"], manifest["base"], manifest["versions"], parts
    )


def _check_place(folder: Path) -> None:
    """Say where the checkpoint is, if it lies just below the folder named."""
    if folder.is_dir() and not (folder / FILE).exists():
        below = sorted(p.parent.name for p in folder.glob(f"*/{FILE}"))
        if below:
            raise CheckpointError(
                "this folder holds checkpoints in folders of its own",
                saw=", ".join(map(ascii, below[:5])) + (", …" if len(below) > 5 else ""),
                do=f"name one of them: {ascii(str(folder / below[0]))[1:-1]}",
            )


def _part(entry: dict[str, Any], file: Any, keys: dict[str, str]) -> SavedPart:
    calibration = sorted(k.removeprefix(CALIBRATION) for k in keys if k.startswith(CALIBRATION))
    if calibration != sorted(entry["calibration"]):
        raise damaged("the calibration tensors are not those the manifest lists")
    tensors = tensorfile.headers(file, keys)
    own = [tensor for name, tensor in tensors.items() if not name.startswith(CALIBRATION)]
    return SavedPart(
        name=entry["name"], method=entry["method"], settings=entry["settings"], sites=entry["sites"],
        shapes={name: list(t.shape) for name, t in tensors.items()},
        parameters=sum(t.numel() for t in own),
        bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        needs=[_needed(method, entry) for method in dict.fromkeys(_methods(entry))],
    )  # fmt: skip


def _methods(entry: dict[str, Any]) -> Iterator[str]:
    """Yield the part's own method and those inside its settings (composites)."""
    yield entry["method"]
    waiting: list[Any] = [entry["settings"]]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if is_method(value):
                yield value["method"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _needed(method: str, entry: dict[str, Any]) -> Needed:
    """Say which package brings a method: the file's word for it only where it is a package's name."""
    package = entry["distribution"] if method == entry["method"] else ""
    if method in (ours := known()):
        package = ours[method].package
    here = inlay.methods().get(method)
    install = f"pip install {package}" if PACKAGE.fullmatch(package) else None
    version = entry["version"] if method == entry["method"] else ""
    return Needed(method, package, version, here.version if here else None, None if here else install)
