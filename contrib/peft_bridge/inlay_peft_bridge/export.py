"""Writing an attached adapter as a peft checkpoint."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from inlay.hosts import own_class
from inlay.stack import Placed, need_state
from inlay_peft_bridge import files
from inlay_peft_bridge.converter import Converter, Place, Tensors
from inlay_peft_bridge.load import PREFIX, TRAINED, kept_in, parts_shared, places
from inlay_peft_bridge.report import Report, refused
from inlay_peft_bridge.table import for_method

TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
         "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForTokenClassification": "TOKEN_CLS",
         "ForQuestionAnswering": "QUESTION_ANS"}  # fmt: skip
Layer = tuple[Tensors, dict[str, Any]]  # a layer's tensors as peft has them, and its configuration


def to_peft(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> Report:
    """Write the adapter `name` of `model` as a peft checkpoint to a new folder; return what was done.

    Raises, and writes nothing, where peft could not say exactly the same.
    """
    parts = need_state(model).find(name)
    own = [part for part in parts if part.method.id != TRAINED]
    converter = the_converter(own)
    layers: dict[str, Layer] = {}
    for part in own:
        for path, layer in layers_of(part, converter).items():
            if path in layers:
                raise refused(
                    "two parts act on one layer, and a peft checkpoint holds one adapter",
                    saw=f"{path}: {', '.join(p.part_name for p in own)}",
                    do="convert them one by one: to_peft(model, folder, name), or merge them",
                )
            layers[path] = layer
    shared = shared_by(own, converter)
    whole = [(place, held) for part in parts if part not in own for place, held in places(part.adapter, {})]
    config = common(layers, converter)
    tensors = {
        f"{PREFIX}{path}.{leaf_of(key, path, converter, model)}": tensor
        for path, (found, _) in layers.items()
        for key, tensor in found.items()
    }
    for place, held in whole:
        for key, (owner, leaf) in held.items():
            tensors[f"{PREFIX}{place.path}.{key}"] = stored_as(place, owner.get_parameter(leaf))
    tensors |= {f"base_model.{there}": tensor for there, tensor in shared.items()}
    for path in layers if converter.repeats else ():
        tensors |= {f"{PREFIX}{path}.{there}": tensor for there, tensor in shared.items()}
    base = str(getattr(model, "name_or_path", "")) or None
    files.write(Path(folder), {
        "peft_type": converter.peft_type, "peft_version": files.FORMAT, "base_model_name_or_path": base,
        "task_type": task_of(model), "inference_mode": True, "target_modules": sorted(layers),
        "modules_to_save": sorted(place.path for place, _ in whole) or None, **config,
    }, tensors)  # fmt: skip
    count = sum(t.numel() for t in tensors.values())
    return Report(converter.method, converter.peft_type, len(layers) + len(whole), len(tensors), count)


def shared_by(parts: Sequence[Placed], converter: Converter) -> Tensors:
    """Return the tensors that all layers share, under peft's names."""
    if converter.shared and len(parts) > 1:
        raise refused(
            "in peft all layers share the same matrices, and here each part has its own",
            saw=", ".join(part.part_name for part in parts),
            do="convert them one by one: to_peft(model, folder, 'name/part')",
        )
    if not converter.shared:
        return {}
    held = dict(parts_shared(parts[0].adapter, converter))
    found: Tensors = {}
    for there, here in converter.shared.items():
        owner, leaf = held[here]
        found[there] = converter.write_shared(there, kept_in(owner, leaf)[leaf].detach())
    return found


def the_converter(parts: Sequence[Placed]) -> Converter:
    """Return the converter of all parts, which must be of one method."""
    methods = list(dict.fromkeys(part.method.id for part in parts))
    if len(methods) != 1:
        raise refused(
            "a peft checkpoint holds one method beside modules trained whole",
            saw=" + ".join(methods) or "only modules trained whole",
            do="convert the parts one by one: to_peft(model, folder, 'name/part')",
        )
    return for_method(methods[0])


def layers_of(part: Placed, converter: Converter) -> dict[str, Layer]:
    """Return a part's layers as peft has them: the slices of a fused one joined."""
    settings = part.method.to_dict()
    base = converter.config_of(settings)
    found: dict[str, list[tuple[Place, Layer]]] = {}
    for place, held in places(part.adapter, settings, converter.buffers):
        if place.site.expert is not None:
            raise refused(
                "an expert's matrix is no module, and peft has no place for its adapter",
                saw=place.site.name,
                do="merge the adapter instead: inlay merge",
            )
        values = {key: kept_in(owner, leaf)[leaf].detach() for key, (owner, leaf) in held.items()}
        layer = (converter.write(values, place), {**base, **converter.own_config(place)})
        found.setdefault(place.path, []).append((place, layer))
    return {path: joined(path, at, converter) for path, at in found.items()}


def joined(path: str, at: Sequence[tuple[Place, Layer]], converter: Converter) -> Layer:
    """Return one layer of the parts of it that were adapted."""
    place, layer = at[0]
    if place.site.part is None:
        return layer
    if converter.join is None:
        raise refused(
            f"peft cannot adapt a slice of a fused layer by {converter.method}",
            saw=", ".join(p.site.name for p, _ in at),
            do=f"train the layer as a whole: targets=[{path.rpartition('.')[2]!r}]",
        )
    out = type(place.site)(**{**vars_of(place.site), "part": None}).out_features
    tensors, config = converter.join([(p.site.part, t, c) for p, (t, c) in at], out)
    return tensors, {**layer[1], **config}


def vars_of(site: Any) -> dict[str, Any]:
    """Return what a site is made of."""
    return {key: value for key, value in vars(site).items() if not key.startswith("_")}


def common(layers: dict[str, Layer], converter: Converter) -> dict[str, Any]:
    """Return one configuration for all layers, with patterns and lists for what differs among them."""
    configs = {path: config for path, (_, config) in layers.items()}
    keys = next(iter(configs.values())).keys()
    found: dict[str, Any] = {}
    for key in keys:
        values = {path: config[key] for path, config in configs.items()}
        pattern = next((p for p, overridden in converter.patterns.items() if overridden == key), None)
        if key in converter.lists:
            found[key] = sorted(path for path, value in values.items() if value)
            continue
        found[key] = usual = Counter(values.values()).most_common(1)[0][0]
        others = {path: value for path, value in values.items() if value != usual}
        if pattern is not None:
            found[pattern] = others
        elif others:
            raise refused(
                "layers differ in a setting that peft has once for all",
                saw=f"{key}: {sorted(set(map(str, values.values())))}",
                do="convert the parts one by one: to_peft(model, folder, 'name/part')",
            )
    return found


def leaf_of(key: str, path: str, converter: Converter, model: nn.Module) -> str:
    """Return what peft calls a tensor at a module; embeddings have names of their own."""
    leaves = [leaf for leaf, here in converter.tensors.items() if here == key]
    embedding = isinstance(model.get_submodule(path), nn.Embedding)
    return next((leaf for leaf in leaves if ("embedding" in leaf) == embedding), leaves[0])


def stored_as(place: Place, value: Tensor) -> Tensor:
    """Return a trained tensor as its module stores it."""
    return value.T if place.site.kind == "conv1d" and value.dim() == 2 else value


def task_of(model: nn.Module) -> str | None:
    """Return peft's name of what a transformers model is for, None for others."""
    kind = own_class(model).__name__
    return next((task for end, task in TASKS.items() if kind.endswith(end)), None)
