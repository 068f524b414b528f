"""Checkpoints: a folder with `inlay.json` and one safetensors file, saved atomically, loaded strictly.

The tensors are written and synced first under a name with their digest; replacing `inlay.json`,
which names that file, is the commit. Loading builds the stack on the meta device and compares it
with the file's header before anything is allocated. Never pickle, never the network.
"""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from inlay import identity, manifest, tensorfile
from inlay.adapter import Adapter
from inlay.attach import place, start
from inlay.distributed import mesh_of, once
from inlay.errors import CheckpointError, ConfigError, InlayError, RegistryError, near, shown
from inlay.manifest import FILE, MAX_METHODS, damaged, read_manifest
from inlay.plan import build_adapter, check_dtype, resolve_names
from inlay.registry import registry
from inlay.settings import is_method
from inlay.sites import Site
from inlay.stack import Part, Placed, Stack, State, check_name, need_state
from inlay.weights import whole

CALIBRATION = "calibration:"
LEAST_ROOM = 1 << 20  # numbers an adapter may always hold beside what is saved
ROOM = 6  # times the base's own: a fixed random transform of every tensor takes up to that


def save(
    model: nn.Module, folder: str | os.PathLike[str], name: str | None = None, *, overwrite: bool = False
) -> str:
    """Save the adapter `name` (default: the whole stack of active adapters) to `folder`; return its digest.

    The old checkpoint in the folder stays whole until the new one is complete. Saving over a
    checkpoint of another stack is refused unless `overwrite`. Merged parts are saved as if
    unmerged. The digest covers the manifest and, through it, the tensors. Of a sharded model all
    processes must save at once: together they gather, and the first of them writes.
    """
    state = need_state(model)
    placed = state.find(name) if name is not None else _all_parts(state)
    path = Path(folder)
    tensors: dict[str, Tensor] = {}
    named = zip(placed, _part_names(placed), strict=True)
    parts = [_describe(p, part_name, number, tensors) for number, (p, part_name) in enumerate(named)]
    data = to_bytes(tensors)
    content = manifest.sealed({
        "format": manifest.FORMAT, "parts": parts, "base": identity.identity(state.model),
        "tensors": tensorfile.file_name(data),
        "versions": {"inlay": version("inlay"), "torch": str(torch.__version__)},
    })  # fmt: skip
    text = json.dumps(content, indent=1, ensure_ascii=True)

    def write() -> None:
        _refuse_other_stack(path, content["parts"], overwrite)
        tensorfile.commit(path, content["tensors"], data, text.encode())

    once(mesh_of(state.model), write)
    return str(content["digest"])


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    activate: bool = True,
    trainable: bool = True,
    allow: Sequence[str] | None = None,
    expected_digest: str | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Load a checkpoint onto `model` as the adapter `name`; return how many tensors it held.

    `allow` limits which installed methods the manifest may choose. `expected_digest`, known from
    elsewhere, proves the checkpoint is the one meant; the digest inside the folder only detects
    damage. `dtype` is what its tensors are kept in, by default the one it was attached in, else the
    base's own. Raises `CheckpointError` (or what building the stack raises) with the model untouched.
    """
    state = start(model, name, "load")
    check_dtype(dtype)
    path = Path(folder)
    content = read_manifest(path)
    if expected_digest is not None and content["digest"] != expected_digest:
        raise CheckpointError(
            "this is not the checkpoint you expected",
            saw=f"digest {content['digest']!a}",
            do=f"you expected {shown(expected_digest)}; get the checkpoint from its author",
        )
    entries = content["parts"]
    stack = Stack(tuple(_part(entry, allow) for entry in entries))
    differing = _check_base(model, content["base"])
    with tensorfile.opened(path, content["tensors"]) as file:
        resolved = resolve_names(model, list(zip(stack.parts, [e["sites"] for e in entries], strict=True)))
        stored = tensorfile.by_part(file, len(entries))
        sources = [
            _Source(state, file, part, sites, entry, keys, dtype)
            for (part, sites), entry, keys in zip(resolved, entries, stored, strict=True)
        ]
        for source in sources:
            source.check()
        built = [source.placed(name, state.next_id + number) for number, source in enumerate(sources)]
    if differing:
        warnings.warn(
            f"this adapter was saved for another base: {'; '.join(differing)}. It fits in shape; its effect "
            "on other weights is unknown.",
            stacklevel=2,
        )
    place(state, built, activate=activate, trainable=trainable)
    return sum(len(source.values) for source in sources)


# -- saving --------------------------------------------------------------------------------------


def _all_parts(state: State) -> list[Placed]:
    return [state.placed[i] for i in state.active] or list(state.placed.values())


def _part_names(placed: Sequence[Placed]) -> list[str]:
    """Return unique names for the parts: their own, or, where two adapters share one, "adapter:part"."""
    counts = Counter(p.part_name for p in placed)
    names = [p.part_name if counts[p.part_name] == 1 else f"{p.adapter_name}:{p.part_name}" for p in placed]
    for name in names:
        check_name(name, "part")
    return names


def _describe(placed: Placed, name: str, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return a part's entry in the manifest, and add its tensors under "<number>/<local name>"."""
    method, adapter = placed.method, placed.adapter
    adapter.recall()
    state = dict(registry.call("state_dict", method, adapter=adapter))
    calibration = {f"{CALIBRATION}{k}": t for k, t in adapter.measured.items()}
    for key, tensor in {**state, **calibration}.items():
        full = whole(tensor)
        if full.is_floating_point() and not bool(full.isfinite().all()):
            raise CheckpointError(
                "the adapter has values that are not finite", saw=f"{placed.path}: {key}", do="do not save it"
            )
        tensors[f"{number}/{key}"] = full.detach().cpu().contiguous().clone()
    origin = registry.origin(type(method))
    dtype = adapter.kept_dtype
    return {
        "name": name, "method": method.id, "distribution": origin.distribution,
        "version": origin.version, "method_version": method.version, "settings": method.to_dict(),
        "sites": [site.name for site in adapter.sites], "data": adapter.data,
        "calibration": sorted(adapter.measured), "seed": adapter.seed,
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}),
    }  # fmt: skip


def _refuse_other_stack(path: Path, parts: list[dict[str, Any]], overwrite: bool) -> None:
    if overwrite or not (path / FILE).exists():
        return
    try:
        there = read_manifest(path)["parts"]
    except InlayError as error:
        raise CheckpointError(
            f"the folder holds an {FILE} that cannot be read",
            saw=error.saw,
            do="pass overwrite=True to replace it",
        ) from error
    if [_kind(p) for p in there] != [_kind(p) for p in parts]:
        raise CheckpointError(
            "the folder holds a checkpoint of another stack",
            saw=" + ".join(ascii(p["method"]) for p in there),
            do="choose another folder, or pass overwrite=True to replace it",
        )


def _kind(part: dict[str, Any]) -> str:
    return json.dumps([part["name"], part["method"], part["settings"]], sort_keys=True)


# -- loading -------------------------------------------------------------------------------------


def _part(entry: dict[str, Any], allow: Sequence[str] | None) -> Part:
    """Return a part of the manifest as a configured method; names the package to install if absent."""
    if allow is not None and not isinstance(allow, (list, tuple, set, frozenset)):
        raise ConfigError("allow is a list of methods", saw=f"allow={shown(allow)}", do='allow=["lora"]')
    check_name(entry["name"], "part")
    wanted = list(_methods_named(entry))
    if len(wanted) > MAX_METHODS:
        raise damaged(f"a part with {len(wanted):,} methods inside, at most {MAX_METHODS} are read")
    for method in wanted:
        if allow is not None and method not in allow:
            raise CheckpointError(
                "the checkpoint asks for a method that is not allowed here",
                saw=ascii(method)[:100],
                do=f"allow=[...] permits only {sorted(allow)}",
            )
        if method not in registry.methods():
            raise _not_installed(method, entry)
    with _from_file(entry):
        return Part(entry["name"], registry.build(entry["method"], entry["settings"]))


def _not_installed(method: str, entry: dict[str, Any]) -> RegistryError:
    package = entry["distribution"]
    known = bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", package)) and method == entry["method"]
    return RegistryError(
        f"the checkpoint needs the method {ascii(method)[:100]}, which is not installed",
        saw=f"saved with {ascii(package)[:100]} {ascii(entry['version'])[:50]}",
        do=f"pip install {package} (if you trust it: the checkpoint names it)"
        if known
        else near(method, registry.methods()),
    )


@contextmanager
def _from_file(entry: dict[str, Any]) -> Iterator[None]:
    """Turn what a method raises on hostile settings or data into an error about the checkpoint."""
    try:
        yield
    except InlayError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the part {ascii(entry['name'])[:100]} of the checkpoint cannot be built",
            saw=f"{type(error).__name__}: {ascii(str(error))[:300]}",
            do=manifest.DO,
        ) from error


def _methods_named(entry: Any) -> Iterator[str]:
    """Yield the ids of a part's method and of the methods inside its settings."""
    if isinstance(entry, dict) and "settings" in entry and (is_method(entry) or "sites" in entry):
        yield entry["method"]
        entry = entry["settings"]
    for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
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


class _Source:
    """One part of a checkpoint, on its way from the file onto a model."""

    def __init__(
        self,
        state: State,
        file: Any,
        part: Part,
        sites: tuple[Site, ...],
        entry: dict[str, Any],
        keys: Mapping[str, str],
        dtype: torch.dtype | None,
    ) -> None:
        self.state, self.file, self.part, self.sites, self.entry = state, file, part, sites, entry
        measured = {k for k in keys if k.startswith(CALIBRATION)}
        self.calibration = {k.removeprefix(CALIBRATION): keys[k] for k in measured}
        self.keys = {k: v for k, v in keys.items() if k not in measured}
        self.values: dict[str, Tensor] = {}
        self.dtype = manifest.DTYPES.get(entry.get("dtype", "")) if dtype is None else dtype

    def check(self) -> None:
        """Build the part on meta and compare it with the file's header; only then read its values."""
        name, method = self.part.name, self.part.method
        tensorfile.compare_names(f"{name}, calibration", self.entry["calibration"], self.calibration)
        with _from_file(self.entry):
            trial = self._build(tensorfile.headers(self.file, self.calibration))
            wanted = registry.call("state_dict", method, adapter=trial)
            self._check_room(trial, wanted)
            migrated = self._migrated()
        if migrated is None:
            tensorfile.compare(name, wanted, tensorfile.headers(self.file, self.keys))
            migrated = tensorfile.read(self.file, self.keys)
        else:
            tensorfile.compare(name, wanted, migrated)
        tensorfile.check_finite(name, migrated, wanted)
        self.values = migrated

    def placed(self, name: str, number: int) -> Placed:
        """Return the part with the values from the file, ready to be put on the model."""
        calibration = tensorfile.read(self.file, self.calibration)
        tensorfile.check_finite(self.part.name, calibration, calibration)
        adapter = self._build(calibration, f"{name}/{self.part.name}")
        _fill(self.part, adapter, self.values)
        return Placed(number, name, self.part.name, self.part.method, adapter)

    def _build(self, calibration: Mapping[str, Tensor], path: str = "") -> Adapter:
        return build_adapter(
            self.state.model, self.part.method, self.sites, seed=self.entry["seed"], calibration=calibration,
            data=copy.deepcopy(self.entry["data"]), find=self.state.adapter_of, path=path,
            meta=not path, filled=bool(path), dtype=self.dtype,
        )  # fmt: skip

    def _migrated(self) -> dict[str, Tensor] | None:
        """Return an older part's tensors translated by its method, or None if none is needed."""
        method, entry = self.part.method, self.entry
        if entry["method_version"] == method.version:
            return None
        if not 0 < entry["method_version"] < method.version or not registry.implements(method, "migrate"):
            raise CheckpointError(
                f"this version of {method.id!r} cannot read the checkpoint",
                saw=f"saved by version {entry['method_version']}, installed is {method.version}",
                do=f"install {ascii(entry['distribution'])[:100]} {ascii(entry['version'])[:50]}",
            )
        state = tensorfile.read(self.file, self.keys)
        return dict(registry.call("migrate", method, state=state, from_version=entry["method_version"]))

    def _check_room(self, trial: Adapter, saved: Mapping[str, Tensor]) -> None:
        """Refuse settings that ask for far more memory than the file holds tensors for."""
        held = sum(t.numel() for _, m in trial.modules() for t in [*m.parameters(), *m.buffers()])
        beside = held - sum(t.numel() for t in saved.values())
        if beside > max(LEAST_ROOM, ROOM * trial.base_size):
            raise damaged(f"the settings ask for {beside:,} numbers that are not in the file")


def _fill(part: Part, adapter: Adapter, values: Mapping[str, Tensor]) -> None:
    """Copy the file's values into the adapter's tensors."""
    own = registry.call("state_dict", part.method, adapter=adapter)
    places = {t.data_ptr() for _, m in adapter.modules() for t in [*m.parameters(), *m.buffers()]}
    with torch.no_grad():
        for key, tensor in values.items():
            if own[key].data_ptr() not in places:
                raise RegistryError(
                    f"the state_dict of {part.method.id!r} gives copies, so nothing can be loaded into it",
                    saw=f"{key} is none of the adapter's own tensors",
                    do="return the adapter's parameters and buffers themselves, as adapter.tensors() does",
                )
            own[key].copy_(tensor)
