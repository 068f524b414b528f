"""Checkpoints: a folder with `inlay.json` and one safetensors file, saved atomically, loaded strictly.

The tensors are written and synced first under a name with their digest; replacing `inlay.json`,
which names that file, is the commit. Loading builds the stack on the meta device and compares it
with the file's header before anything is allocated. Never pickle, never the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from inlay import identity, manifest
from inlay.adapter import Adapter
from inlay.attach import place, start
from inlay.errors import CheckpointError, InlayError, RegistryError, near
from inlay.manifest import FILE, damaged, read_manifest
from inlay.plan import build_adapter, resolve_names
from inlay.registry import registry
from inlay.sites import Site
from inlay.stack import Part, Placed, State, check_name, need_state

PATTERN = re.compile(r"adapter-[0-9a-f]{64}\.safetensors")


def save(
    model: nn.Module, folder: str | os.PathLike[str], name: str | None = None, *, overwrite: bool = False
) -> str:
    """Save the adapter `name` (default: the whole stack of active adapters) to `folder`; return its digest.

    The old checkpoint in the folder stays whole until the new one is complete. Saving over a
    checkpoint of another stack is refused unless `overwrite`. Merged parts are saved as if
    unmerged.
    """
    state = need_state(model)
    placed = state.find(name) if name is not None else _all_parts(state)
    path = Path(folder)
    tensors: dict[str, Tensor] = {}
    parts = [_describe(p, number, tensors) for number, p in enumerate(placed)]
    _refuse_other_stack(path, parts, overwrite)
    data = to_bytes(tensors)
    digest = hashlib.sha256(data).hexdigest()
    content = {
        "format": manifest.FORMAT, "parts": parts, "base": identity.identity(model),
        "tensors": f"adapter-{digest}.safetensors", "digest": digest, "seed": placed[0].adapter.seed,
        "versions": {"inlay": version("inlay"), "torch": str(torch.__version__)},
    }  # fmt: skip
    _commit(path, str(content["tensors"]), data, json.dumps(content, indent=1, ensure_ascii=True).encode())
    return digest


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    activate: bool = True,
    trainable: bool = True,
    allow: Sequence[str] | None = None,
    expected_digest: str | None = None,
) -> int:
    """Load a checkpoint onto `model` as the adapter `name`; return how many tensors it held.

    `allow` limits which installed methods the manifest may choose. `expected_digest`, known from
    elsewhere, proves the tensors are the ones meant; the digest inside the folder only detects
    damage. Raises `CheckpointError` (or what building the stack raises) with the model untouched.
    """
    state = start(model, name, "load")
    path = Path(folder)
    content = read_manifest(path)
    parts = [_part(entry, allow) for entry in content["parts"]]
    differing = _check_base(model, content["base"])
    with _verified(path, content, expected_digest) as file:
        resolved = resolve_names(model, [(p, e["sites"]) for p, e in zip(parts, content["parts"], strict=True)])
        stored = _by_part(file, len(parts))
        migrated = [
            _migrated(file, part, entry, stored[number])
            for number, (part, entry) in enumerate(zip(parts, content["parts"], strict=True))
        ]
        built = _build(state, name, resolved, content, stored, migrated, file)
    for placed, values in zip(built, migrated, strict=True):
        _fill(placed, values)
    place(state, built, activate=activate, trainable=trainable)
    if differing:
        warnings.warn(
            f"this adapter was saved for another base: {'; '.join(differing)}. It fits in shape and was "
            "loaded; its effect on other weights is unknown.",
            stacklevel=2,
        )
    return sum(len(values) for values in migrated)


# -- saving --------------------------------------------------------------------------------------


def _all_parts(state: State) -> list[Placed]:
    return [state.placed[i] for i in state.active] or list(state.placed.values())


def _describe(placed: Placed, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return a part's entry in the manifest, and add its tensors under "<number>/<local name>"."""
    method, adapter = placed.method, placed.adapter
    state = dict(registry.call("state_dict", method, adapter=adapter))
    calibration = {f"{manifest_calibration}{k}": t for k, t in adapter.calibration.items()}
    for key, tensor in {**state, **calibration}.items():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if full.is_floating_point() and not bool(full.isfinite().all()):
            raise CheckpointError(
                "the adapter has values that are not finite", saw=f"{placed.path}: {key}", do="do not save it"
            )
        tensors[f"{number}/{key}"] = full.detach().cpu().contiguous().clone()
    origin = registry.origin(type(method))
    return {
        "name": placed.part_name, "method": method.id, "distribution": origin.distribution,
        "version": origin.version, "method_version": method.version, "settings": method.to_dict(),
        "sites": [site.name for site in adapter.sites], "data": adapter.data,
        "calibration": sorted(adapter.calibration),
    }  # fmt: skip


manifest_calibration = "calibration:"


def _refuse_other_stack(path: Path, parts: list[dict[str, Any]], overwrite: bool) -> None:
    if overwrite or not (path / FILE).exists():
        return
    try:
        there = read_manifest(path)["parts"]
    except InlayError as error:
        raise CheckpointError(
            f"the folder holds an {FILE} that cannot be read", saw=error.saw, do="pass overwrite=True to replace it"
        ) from error
    if [_kind(p) for p in there] != [_kind(p) for p in parts]:
        raise CheckpointError(
            "the folder holds a checkpoint of another stack",
            saw=" + ".join(ascii(p["method"]) for p in there),
            do="choose another folder, or pass overwrite=True to replace it",
        )


def _kind(part: dict[str, Any]) -> str:
    return json.dumps([part["name"], part["method"], part["settings"]], sort_keys=True)


def _commit(folder: Path, name: str, data: bytes, content: bytes) -> None:
    """Write the tensors, then replace the manifest: that is the commit. Then drop older tensor files."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    temporary = folder / f".{FILE}.{os.getpid()}"
    fresh = not (folder / name).exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            _write_synced(folder / f".{name}.{os.getpid()}", data)
            os.replace(folder / f".{name}.{os.getpid()}", folder / name)
        _write_synced(temporary, content)
        os.replace(temporary, folder / FILE)
    except BaseException:
        leftovers = [temporary, folder / f".{name}.{os.getpid()}", *([folder / name] if fresh else [])]
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        for directory in made:
            if directory.exists():
                directory.rmdir()
        raise
    _sync_directory(folder)
    for old in folder.iterdir():
        stale = PATTERN.fullmatch(old.name) and old.name != name
        if stale or old.name.startswith((".adapter-", f".{FILE}.")):
            old.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- loading -------------------------------------------------------------------------------------


def _part(entry: dict[str, Any], allow: Sequence[str] | None) -> Part:
    """Return a part of the manifest as a configured method; names the package to install if absent."""
    check_name(entry["name"], "part")
    for method in _methods_named(entry):
        if allow is not None and method not in allow:
            raise CheckpointError(
                "the checkpoint asks for a method that is not allowed here",
                saw=ascii(method)[:100],
                do=f"allow=[...] permits only {sorted(allow)}",
            )
        if method not in registry.origins() and method not in registry._local:
            raise RegistryError(
                f"the checkpoint needs the method {ascii(method)[:100]}, which is not installed",
                saw=f"saved with {ascii(entry['distribution'])[:100]} {ascii(entry['version'])[:50]}",
                do=f"pip install {entry['distribution']}"
                if re.fullmatch(r"[A-Za-z0-9._-]{1,100}", entry["distribution"])
                else near(method, registry.origins()),
            )
    return Part(entry["name"], registry.build(entry["method"], entry["settings"]))


def _methods_named(value: Any) -> Iterator[str]:
    """Yield the ids of a part's method and of the methods inside its settings."""
    if isinstance(value, dict):
        if isinstance(value.get("method"), str):
            yield value["method"]
        for inner in value.values():
            yield from _methods_named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _methods_named(inner)


def _check_base(model: nn.Module, saved: dict[str, Any]) -> list[str]:
    """Refuse a base of another shape; return what else differs, to be warned about."""
    found = identity.differences(saved, model)
    shapes = [d for d in found if d.startswith(("architecture", "shapes"))]
    if shapes:
        raise CheckpointError(
            "this adapter was made for a base of another shape",
            saw="; ".join(ascii(d)[:200] for d in shapes),
            do="load it onto the model it was trained on",
        )
    return [ascii(d)[1:-1] for d in found]


@contextmanager
def _verified(path: Path, content: dict[str, Any], expected: str | None) -> Iterator[Any]:
    """Open the tensors file the manifest names, after checking its name, size and digest."""
    name, digest = content["tensors"], content["digest"]
    if not PATTERN.fullmatch(name):
        raise damaged(f"the tensors file has the name {ascii(name)[:200]}")
    file = path / name
    manifest.check_regular(file, path)
    with open(file, "rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != digest or f"adapter-{actual}.safetensors" != name:
        raise damaged(f"{name[:24]}… does not have the digest the manifest names")
    if expected is not None and actual != expected:
        raise CheckpointError(
            "these are not the tensors you expected",
            saw=f"digest {actual}",
            do=f"you expected {ascii(expected)[:80]}; get the checkpoint from its author",
        )
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise damaged(f"{name[:24]}…: {error}") from error


def _by_part(file: Any, count: int) -> list[dict[str, str]]:
    """Return {local name: key in the file} for each part."""
    found: list[dict[str, str]] = [{} for _ in range(count)]
    for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
        number, _, local = key.partition("/")
        if not number.isdigit() or int(number) >= count or not local:
            raise damaged(f"the tensor {ascii(key)[:200]} belongs to no part")
        found[int(number)][local] = key
    return found


def _migrated(file: Any, part: Part, entry: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Tensor] | None:
    """Return an older part's tensors translated by its method, or None if none is needed."""
    if entry["method_version"] == part.method.version:
        return None
    if entry["method_version"] > part.method.version or not registry.implements(part.method, "migrate"):
        raise CheckpointError(
            f"this version of {part.method.id!r} cannot read the checkpoint",
            saw=f"saved by version {entry['method_version']}, installed is {part.method.version}",
            do=f"install {ascii(entry['distribution'])} {ascii(entry['version'])}",
        )
    state = {local: file.get_tensor(key) for local, key in keys.items()}
    return dict(registry.call("migrate", part.method, state=state, from_version=entry["method_version"]))


def _build(
    state: State,
    name: str,
    resolved: Sequence[tuple[Part, tuple[Site, ...]]],
    content: dict[str, Any],
    stored: Sequence[Mapping[str, str]],
    migrated: list[dict[str, Tensor] | None],
    file: Any,
) -> list[Placed]:
    """Build on meta, compare with the header, then build for real; fill `migrated` with the values."""
    built = []
    for number, (part, sites) in enumerate(resolved):
        entry = content["parts"][number]
        keys, calibration = _split(stored[number], entry["calibration"])
        blank = {k: torch.empty(file.get_slice(key).get_shape(), device="meta") for k, key in calibration.items()}
        options: dict[str, Any] = {"seed": content["seed"] + number, "data": entry["data"], "find": state.adapter_of}
        trial = build_adapter(state.model, part.method, sites, meta=True, calibration=blank, **options)
        older = migrated[number]
        header = _header(file, keys) if older is None else {k: (list(t.shape), t.dtype) for k, t in older.items()}
        compare(part, registry.call("state_dict", part.method, adapter=trial), header)
        values = {k: file.get_tensor(key) for k, key in keys.items()} if older is None else older
        _check_finite(part, values)
        real = {k: file.get_tensor(key) for k, key in calibration.items()}
        adapter = build_adapter(state.model, part.method, sites, calibration=real, **options)
        migrated[number] = values
        built.append(Placed(state.next_id + number, name, part.name, part.method, adapter))
    return built


def _split(keys: Mapping[str, str], names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    calibration = {k.removeprefix(manifest_calibration): v for k, v in keys.items()
                   if k.startswith(manifest_calibration)}  # fmt: skip
    if sorted(calibration) != sorted(names):
        raise damaged("the calibration tensors are not those the manifest lists")
    return {k: v for k, v in keys.items() if not k.startswith(manifest_calibration)}, calibration


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}  # fmt: skip


def _header(file: Any, keys: Mapping[str, str]) -> dict[str, tuple[list[int], torch.dtype | None]]:
    found = {}
    for local, key in keys.items():
        piece = file.get_slice(key)
        found[local] = (list(piece.get_shape()), DTYPES.get(piece.get_dtype()))
    return found


def compare(
    part: Part, wanted: Mapping[str, Tensor], found: Mapping[str, tuple[list[int], torch.dtype | None]]
) -> None:
    """Raise unless `found` holds exactly the wanted names, shapes and kinds of dtype."""
    for problem, names in (("lacks", wanted.keys() - found.keys()), ("has unknown", found.keys() - wanted.keys())):
        if names:
            first = sorted(names)[0]
            raise CheckpointError(
                f"the checkpoint {problem} tensors of {ascii(part.name)[:100]}",
                saw=f"{ascii(first)[:200]} and {len(names) - 1} more",
                do="load a checkpoint of exactly this method and base",
            )
    for key, tensor in wanted.items():
        shape, dtype = found[key]
        if list(tensor.shape) != shape:
            raise CheckpointError(
                "a tensor of the checkpoint has the wrong shape",
                saw=f"{ascii(key)[:200]}: {shape} in the file, {list(tensor.shape)} here",
                do="load it onto the base and with the settings it was trained with",
            )
        if dtype is None or dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise CheckpointError(
                "a tensor of the checkpoint has the wrong dtype",
                saw=f"{ascii(key)[:200]}: {dtype} in the file, {tensor.dtype} here",
                do=manifest.DO,
            )


def _check_finite(part: Part, values: Mapping[str, Tensor]) -> None:
    for key, tensor in values.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                "a tensor of the checkpoint has values that are not finite",
                saw=f"{ascii(key)[:200]} of {ascii(part.name)[:100]}",
                do="the training that made it diverged; train again with a smaller learning rate",
            )


def _fill(placed: Placed, values: Mapping[str, Tensor] | None) -> None:
    """Copy the file's values into the adapter's tensors."""
    own = registry.call("state_dict", placed.method, adapter=placed.adapter)
    with torch.no_grad():
        for key, tensor in (values or {}).items():
            own[key].copy_(tensor)


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    return adapter.tensors()
