"""Reading a peft checkpoint onto a model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.adapter import Adapter
from inlay.registry import registry
from inlay.stack import Part, Stack, need_state
from inlay_peft_bridge import files
from inlay_peft_bridge.converter import Config, Converter, Place, Tensors, fitted
from inlay_peft_bridge.report import Report, refused
from inlay_peft_bridge.table import for_config

PREFIX = "base_model.model."
ELSEWHERE = frozenset({  # where it acts is read off the tensors; the rest says nothing about them
    "peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type", "auto_mapping",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "fan_in_fan_out",
})  # fmt: skip
TRAINED = "trained"


@dataclass
class Contents:
    """What a checkpoint holds: the adapter's tensors by module and name here, whole modules, base copies."""

    adapter: dict[str, Tensors] = field(default_factory=dict)
    trained: dict[str, Tensors] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    shared: Tensors = field(default_factory=dict)


def from_peft(folder: str | os.PathLike[str], model: nn.Module, name: str = "default") -> Report:
    """Attach the peft checkpoint in `folder` to `model` as the adapter `name`; return what was done.

    Strict: whatever it holds that has no exact counterpart is refused, the model as it was. On a model
    on the meta device the adapter's tensors are real: `inlay.save` then writes a checkpoint of it.
    """
    path = Path(folder)
    config = files.read_config(path)
    converter = for_config(config)
    check_config(config, converter)
    contents = sorted_out(files.read_tensors(path), config, converter)
    report = Report(converter.method, converter.peft_type)
    check_copies(contents.copies, model, report)
    inlay.attach(model, stack_of(config, converter, contents), name)
    try:
        fill(model, name, converter, contents, report)
    except BaseException:
        inlay.detach(model, name)
        raise
    return report


def check_config(config: Config, converter: Converter) -> None:
    """Raise if the configuration says anything that would be lost."""
    known = converter.understood() | ELSEWHERE
    lost = {k: v for k, v in config.items() if k not in known and not neutral(v)}
    if lost:
        raise refused(
            "the adapter's configuration asks for what has no counterpart here",
            saw=", ".join(f"{ascii(k)[1:-1]}={v!a}"[:100] for k, v in sorted(lost.items())[:5]),
            do="merge it in peft instead, or train without it",
        )


def neutral(value: Any) -> bool:
    """Whether a value of a setting is that of one not made use of."""
    return not value or value == "none"


def sorted_out(tensors: Mapping[str, Tensor], config: Config, converter: Converter) -> Contents:
    """Return the checkpoint's tensors by what they are."""
    contents, unknown = Contents(), []
    again: list[tuple[str, Tensor]] = []  # of what all layers share, as some methods save it at each
    for key, tensor in tensors.items():
        place = key.removeprefix(PREFIX)
        if (common := key.removeprefix("base_model.")) in converter.shared:
            contents.shared[converter.shared[common]] = tensor
            continue
        leaf = next((leaf for leaf in converter.tensors if place.endswith(f".{leaf}")), None)
        module, _, last = place.rpartition(".")
        if leaf is not None:
            here = contents.adapter.setdefault(place.removesuffix(f".{leaf}"), {})
            here[converter.tensors[leaf]] = tensor
        elif last in converter.shared:
            again.append((converter.shared[last], tensor))
        elif place.endswith(".base_layer.weight"):
            contents.copies[place.removesuffix(".base_layer.weight")] = tensor
        elif last in ("weight", "bias") and saved_whole(module, config):
            contents.trained.setdefault(module, {})[last] = tensor
        else:
            unknown.append(key)
        if not key.startswith(PREFIX):
            unknown.append(key)
    unknown += [k for k, t in again if k not in contents.shared or not torch.equal(t, contents.shared[k])]
    if unknown or not contents.adapter:
        raise refused(
            "the checkpoint holds tensors of another kind than its configuration says",
            saw=", ".join(ascii(k)[1:-1] for k in unknown[:5]) or f"none of {sorted(converter.tensors)}",
            do=files.DO,
        )
    return contents


def saved_whole(module: str, config: Config) -> bool:
    """Whether a module is one of those that peft trained and saved whole, or inside one."""
    whole = config.get("modules_to_save") or ()
    return any(f".{kept}." in f".{module}." for kept in whole)


def check_copies(copies: Mapping[str, Tensor], model: nn.Module, report: Report) -> None:
    """Raise if the base's embeddings that peft saved along are not the model's."""
    for path, copy in copies.items():
        own: Any = model.get_submodule(path).weight
        if own.is_meta:
            report.notes.append(f"the copy of {path} in it was not compared with the base's")
        elif own.shape != copy.shape or not torch.equal(own, copy.to(own.device, own.dtype)):
            raise refused(
                "the checkpoint holds an embedding that is not the base's",
                saw=f"{path}: {tuple(copy.shape)}, the base has {tuple(own.shape)}",
                do="resize or load the base's embedding as in training, then convert",
            )


def stack_of(config: Config, converter: Converter, contents: Contents) -> Stack:
    """Return the adapter as a stack: a part for each group of layers with the same settings."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for path in contents.adapter:
        settings = converter.settings_of(config_at(path, config, converter))
        groups.setdefault(repr(settings), (settings, []))[1].append(path)
    parts = []
    for number, (settings, paths) in enumerate(groups.values()):
        method = registry.build(converter.method, {**settings, "targets": paths})
        parts.append(Part(f"{converter.method}_{number + 1}" if number else converter.method, method))
    if contents.trained:
        parts.append(Part(TRAINED, registry.build(TRAINED, {"targets": list(contents.trained)})))
    return Stack(tuple(parts))


def config_at(path: str, config: Config, converter: Converter) -> dict[str, Any]:
    """Return the configuration with what it says of one layer's own."""
    own: dict[str, Any] = dict(config)
    for key, overridden in converter.patterns.items():
        for pattern, value in (config.get(key) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", path):
                own[overridden] = value
                break
    return own


def fill(model: nn.Module, name: str, converter: Converter, contents: Contents, report: Report) -> None:
    """Put the values into the attached adapter: each of its tensors once, and nothing left over."""
    left = {**contents.adapter, **contents.trained}
    rounded: set[str] = set()
    for placed in need_state(model).find(name):
        if placed.method.id == converter.method:
            fill_shared(placed.adapter, converter, contents, report)
        for place, held in places(placed.adapter, placed.method.to_dict(), converter.buffers):
            given = left.pop(place.path)
            if given.keys() != held.keys():
                raise refused(
                    "a layer's tensors are not those of the method",
                    saw=f"{place.path}: {sorted(given)}, needed {sorted(held)}",
                    do="name the base model that it was trained on",
                )
            if placed.method.id == converter.method:
                given = converter.read(given, place)
            elif place.site.kind == "conv1d" and "weight" in given:
                given = {**given, "weight": given["weight"].T}
            for key, (owner, leaf) in held.items():
                old = kept_in(owner, leaf)[leaf]
                assert old is not None
                value = fitted(given[key], old.shape, f"{place.path}: {key}")
                if value.dtype != old.dtype:
                    rounded.add(f"{value.dtype} to {old.dtype}".replace("torch.", ""))
                put(owner, leaf, value)
                report.tensors, report.parameters = report.tensors + 1, report.parameters + value.numel()
            report.sites += 1
    report.notes += [f"values were rounded from {what}, the base's" for what in sorted(rounded)]


def fill_shared(adapter: Adapter, converter: Converter, contents: Contents, report: Report) -> None:
    """Put the tensors that all layers share into their one place; what a key makes again may be left out."""
    expected = {key for key, _ in parts_shared(adapter, converter)}
    if contents.shared.keys() != expected:
        raise refused(
            "the tensors that all layers share are not in the checkpoint",
            saw=f"{sorted(contents.shared) or 'none'}, needed {sorted(expected)}",
            do="save it in peft with save_projection=True: other libraries draw other numbers",
        )
    for key, (owner, leaf) in parts_shared(adapter, converter):
        old = kept_in(owner, leaf)[leaf]
        assert old is not None
        put(owner, leaf, fitted(contents.shared[key], old.shape, key))
        report.tensors, report.parameters = report.tensors + 1, report.parameters + old.numel()


def parts_shared(adapter: Adapter, converter: Converter) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Yield the names of an adapter's shared tensors here, with where they are held."""
    for key in converter.shared.values():
        owner, _, leaf = key.rpartition(".")
        yield key, (adapter.shared.get_submodule(owner), leaf)


def kept_in(owner: nn.Module, leaf: str) -> dict[str, Any]:
    """Return the mapping that holds a module's tensor: its parameters or its buffers."""
    return owner._parameters if leaf in owner._parameters else owner._buffers


def places(
    adapter: Adapter, settings: Config, buffers: frozenset[str] = frozenset()
) -> Iterator[tuple[Place, dict[str, tuple[nn.Module, str]]]]:
    """Yield each site of an adapter with where its tensors are held, by their names at a site."""
    by_site: dict[str, list[Any]] = {}
    for site, delta in adapter.placed:
        by_site.setdefault(site.name, [site, []])[1].append(delta)
    for site, deltas in by_site.values():
        held = {}
        for number, delta in enumerate(deltas):
            names = [n for n, _ in delta.named_parameters()]
            for key in [*names, *(n for n, _ in delta.named_buffers() if n in buffers)]:
                owner, _, leaf = key.rpartition(".")
                held[f"#{number}.{key}" if number else key] = (delta.get_submodule(owner), leaf)
        yield Place(site, site.name.split("[")[0], deltas, settings), held


def put(owner: nn.Module, leaf: str, value: Tensor) -> None:
    """Give a tensor its value; one on the meta device becomes real."""
    held = kept_in(owner, leaf)
    old = held[leaf]
    assert old is not None
    if old.is_meta:
        made = value.to(old.dtype).clone()
        held[leaf] = nn.Parameter(made, old.requires_grad) if isinstance(old, nn.Parameter) else made
        return
    with torch.no_grad():
        old.copy_(value)
