"""Every model type of transformers' auto classes, on the meta device: built, and looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import inlay
from inlay import InlayError
from inlay.anatomy import Anatomy

TASKS = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence to sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
          "num_decoder_layers", "num_encoder_layers")  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {  # in whose default configurations no layer has attention
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
}
MOST = 8  # layers: hybrids alternate their kinds within as many
NEEDED = ("query", "key", "value", "output", "up", "down")
METHODS = ("lora", "serial_adapter", "prefix_tuning", "prompt_tuning", "ia3", "bitfit")


@dataclass
class Found:
    """What was seen of one model type."""

    kind: str
    type: str
    task: str
    unbuilt: str = ""  # why it could not be built from its default configuration
    roles: set[str] = field(default_factory=set)
    methods: dict[str, bool] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        return [role for role in NEEDED if role not in self.roles]


def kinds() -> dict[str, tuple[str, str]]:
    """Return (model type, task) of every model class, each once."""
    found: dict[str, tuple[str, str]] = {}
    for task, names in TASKS.items():
        for model_type, kind in getattr(modeling_auto, names).items():
            found.setdefault(kind if isinstance(kind, str) else kind[0], (model_type, task))
    return found


def shrink(config: Any, depth: int = 0, most: int = MOST) -> None:
    """Leave a configuration, and those inside it, few layers; nothing else costs on the meta device."""
    sizes = {n: getattr(config, n, None) for n in LAYERS}
    smaller: dict[str, Any] = {n: most for n, v in sizes.items() if isinstance(v, int) and v > most}
    if isinstance(each := getattr(config, "layer_types", None), list):
        smaller["layer_types"] = each[:most]
    for name, value in smaller.items():
        with suppress(Exception):  # a derived or checked value: left as it is
            setattr(config, name, value)
    for value in vars(config).values():
        if hasattr(value, "to_dict") and depth < 3:
            shrink(value, depth + 1, most)


def built(kind: str, model_type: str) -> nn.Module:
    config = CONFIG_MAPPING[model_type](**HYBRIDS.get(model_type, {}))
    shrink(config)
    with torch.device("meta"):
        made: nn.Module = getattr(transformers, kind)(config)
    return made


def look(kind: str, model_type: str, task: str) -> Found:
    """Build a model, find its roles, and ask where methods would go."""
    found = Found(kind, model_type, task)
    try:
        model = built(kind, model_type)
    except Exception as error:  # transformers raises whatever its files provoke
        found.unbuilt = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
        return found
    found.roles = {site.role for site in Anatomy(model).leaves if site.layer is not None} - {""}
    for method in METHODS:
        try:
            inlay.plan(model, method)
            found.methods[method] = True
        except InlayError:
            found.methods[method] = False
    return found


def everything() -> Iterator[Found]:
    for kind, (model_type, task) in kinds().items():
        yield look(kind, model_type, task)
