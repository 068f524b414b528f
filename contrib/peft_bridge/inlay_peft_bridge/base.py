"""Base models from folders, without their weights where those are not needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay_peft_bridge.report import refused

AUTO = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering", "FEATURE_EXTRACTION": "AutoModel"}  # fmt: skip
LABELLED = ("SEQ_CLS", "TOKEN_CLS")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def configuration(base: str, **changes: Any) -> Any:
    """Return the configuration of a model folder or config.json: nothing downloaded, no code of it run."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False, **changes)
    except Exception as error:  # transformers raises whatever the file provokes
        raise refused(
            "the base model's configuration cannot be read",
            saw=f"{base!a}: {type(error).__name__}: {ascii(str(error))[1:-1][:200]}",
            do="name the base model's folder, or its config.json: --base",
        ) from error


def labels_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many classes the head that peft saved has: the base's folder does not say."""
    whole = config.get("modules_to_save") or ()
    rows = {
        len(tensor)
        for key, tensor in tensors.items()
        for path, _, leaf in [key.rpartition(".")]
        if leaf == "weight" and any(path.endswith((f".{m}", f".{m}.out_proj")) for m in whole)
    }
    return {"num_labels": rows.pop()} if config.get("task_type") in LABELLED and len(rows) == 1 else {}


def class_for(config: Any, adapter: Mapping[str, Any]) -> Any:
    """Return the transformers class that an adapter of peft's was made for."""
    import transformers

    task = adapter.get("task_type")
    if task in AUTO and type(config) in getattr(transformers, AUTO[task])._model_mapping:
        return getattr(transformers, AUTO[task])._model_mapping[type(config)]
    named = (adapter.get("auto_mapping") or {}).get("base_model_class")
    return class_named(named or next(iter(config.architectures or ()), None))


def class_named(name: Any) -> Any:
    """Return the transformers model class called `name`."""
    import transformers

    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise refused(
            "the model's class is not one of transformers'",
            saw=ascii(name)[:100],
            do="convert in Python: inlay_peft_bridge.from_peft(folder, model)",
        )
    return kind


def built(kind: Any, config: Any, base: str, *, weights: bool) -> nn.Module:
    """Return the model: from its weights if they are needed and there, else on the meta device."""
    if weights and any((Path(base) / name).is_file() for name in WEIGHTS):
        model: nn.Module = kind.from_pretrained(base, config=config, local_files_only=True, dtype="auto")
        return model.eval()
    with torch.device("meta"):
        empty: nn.Module = kind._from_config(config)
    return empty.eval()
