"""The tensors of a checkpoint folder: opened strictly, compared by header, written atomically.

Nothing in the file is trusted: its name, digest and header's size are checked before it is parsed,
and names, shapes and dtypes before a tensor is read.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inlay import manifest
from inlay.errors import CheckpointError
from inlay.manifest import FILE, damaged

PATTERN = re.compile(r"adapter-[0-9a-f]{64}\.safetensors")
MAX_HEADER = 16 << 20
PATIENCE = 60.0  # seconds that a process waits for others that save to the same folder
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}  # fmt: skip


def file_name(data: bytes) -> str:
    """Return the name of a tensors file with this content."""
    return f"adapter-{hashlib.sha256(data).hexdigest()}.safetensors"


@contextmanager
def opened(folder: Path, name: str) -> Iterator[Any]:
    """Open the tensors file the manifest names, after checking its name, digest and header's size."""
    if not PATTERN.fullmatch(name):
        raise damaged(f"the tensors file has the name {ascii(name)[:200]}")
    file = folder / name
    manifest.check_regular(file, folder)
    with open(file, "rb") as stream:
        (header,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
        if header > MAX_HEADER:
            raise damaged(f"{name[:24]}… has a header of {header:,} bytes, at most {MAX_HEADER:,} are read")
        stream.seek(0)
        if f"adapter-{hashlib.file_digest(stream, 'sha256').hexdigest()}.safetensors" != name:
            raise damaged(f"{name[:24]}… does not have the digest in its name")
    try:
        with safe_open(file, framework="pt") as opening:
            yield opening
    except SafetensorError as error:
        raise damaged(f"{name[:24]}…: {ascii(str(error))[:200]}") from error


def by_part(file: Any, count: int) -> list[dict[str, str]]:
    """Return {local name: key in the file} for each part."""
    found: dict[str, dict[str, str]] = {str(number): {} for number in range(count)}
    for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
        number, _, local = key.partition("/")
        if number not in found or not local:
            raise damaged(f"the tensor {ascii(key)[:200]} belongs to no part")
        found[number][local] = key
    return list(found.values())


def headers(file: Any, keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of the file on the meta device: shapes and dtypes, nothing read."""
    found = {}
    for local, key in keys.items():
        piece = file.get_slice(key)
        dtype = DTYPES.get(piece.get_dtype())
        if dtype is None:
            raise CheckpointError(
                "a tensor of the checkpoint has the wrong dtype",
                saw=f"{ascii(local)[:200]}: {piece.get_dtype()}",
                do=manifest.DO,
            )
        found[local] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
    return found


def read(file: Any, keys: Mapping[str, str]) -> dict[str, Tensor]:
    return {local: file.get_tensor(key) for local, key in keys.items()}


def compare_names(part: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Raise unless `found` holds exactly the wanted names."""
    for problem, names in (
        ("lacks", set(wanted) - set(found)),
        ("has unknown", set(found) - set(wanted)),
    ):
        if names:
            raise CheckpointError(
                f"the checkpoint {problem} tensors of {ascii(part)[:100]}",
                saw=f"{ascii(min(names))[:200]} and {len(names) - 1} more",
                do="load a checkpoint of exactly this method and base",
            )


def compare(part: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise unless `found` holds exactly the wanted names, shapes and dtypes (any float for a float)."""
    compare_names(part, wanted, found)
    for key, tensor in wanted.items():
        if tensor.shape != found[key].shape:
            raise CheckpointError(
                "a tensor of the checkpoint has the wrong shape",
                saw=f"{ascii(key)[:200]}: {list(found[key].shape)} in the file, {list(tensor.shape)} here",
                do="load it onto the base and with the settings it was trained with",
            )
        floats = tensor.is_floating_point() and found[key].is_floating_point()
        if tensor.dtype != found[key].dtype and not floats:
            raise CheckpointError(
                "a tensor of the checkpoint has the wrong dtype",
                saw=f"{ascii(key)[:200]}: {found[key].dtype} in the file, {tensor.dtype} here",
                do=manifest.DO,
            )


def check_finite(part: str, values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise unless every value is finite, also in the dtype it will be kept in."""
    for key, tensor in values.items():
        kept = tensor.to(wanted[key].dtype)
        if kept.is_floating_point() and not bool(kept.isfinite().all()):
            raise CheckpointError(
                "a tensor of the checkpoint has values that are not finite",
                saw=f"{ascii(key)[:200]} of {ascii(part)[:100]}, as {kept.dtype}",
                do="the training that made it diverged; train again with a smaller learning rate",
            )


def commit(folder: Path, name: str, data: bytes, content: bytes) -> None:
    """Write the tensors, then replace the manifest: that is the commit. Then drop older tensor files.

    Processes of one machine that save to one folder take turns. What fails or is killed before
    the commit leaves the old checkpoint whole.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _turn(folder):
            _replace(folder, name, data, content)
    except BaseException as error:
        for directory in made:
            if directory.exists() and not any(directory.iterdir()):
                directory.rmdir()
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            "the checkpoint could not be written",
            saw=f"{type(error).__name__}: {error}",
            do="make room or choose another folder; what was in it is untouched",
        ) from error


def _replace(folder: Path, name: str, data: bytes, content: bytes) -> None:
    fresh = not (folder / name).exists()
    try:
        _write(folder, name, data)
        _write(folder, FILE, content)
    except BaseException:
        for leftover in _temporaries(folder):
            leftover.unlink(missing_ok=True)
        # An interrupt may come after the commit: then the tensors belong to the new manifest.
        if fresh and not ((folder / FILE).is_file() and (folder / FILE).read_bytes() == content):
            (folder / name).unlink(missing_ok=True)
        raise
    stale = [p for p in folder.iterdir() if PATTERN.fullmatch(p.name) and p.name != name]
    for old in [*stale, *_temporaries(folder)]:
        old.unlink(missing_ok=True)


def _temporaries(folder: Path) -> list[Path]:
    """Return what this writer, or one that was killed, has not finished."""
    return [*folder.glob(".adapter-*.writing"), *folder.glob(f".{FILE}.writing")]


def _write(folder: Path, name: str, data: bytes) -> None:
    """Put a file in its place, complete and on disk, or not at all."""
    temporary = folder / f".{name}.writing"
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:  # never through a link that someone put there
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait until no other process writes to the folder; where locks do not exist, go on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(ImportError):
            import fcntl

            until = time.monotonic() + PATIENCE
            while not _taken(fcntl, descriptor):
                if time.monotonic() > until:
                    raise TimeoutError(f"another process has been writing there for {PATIENCE:g} s")
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _taken(fcntl: Any, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
