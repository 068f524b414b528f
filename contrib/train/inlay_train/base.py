"""Base models from folders: their configuration, their skeleton without weights, or all of them.

Nothing here downloads: a hub id stands for what the hub's cache on this machine holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay import InlayError
from inlay.errors import near

TASKS = {
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def folder_of(model: str) -> Path:
    """Return the folder of a model given as a path, or as a hub id that was downloaded before."""
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:
        raise InlayError(
            "there is no such model here",
            saw=f"{model!a} is no folder, and no model in the hub's cache",
            do="check the path, or download it first: hf download <id>",
        ) from error


def configuration(folder: Path, **changes: Any) -> Any:
    """Return the folder's transformers configuration; code that it brings along never runs."""
    quiet()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **changes)
    except Exception as error:  # transformers raises whatever the file provokes
        raise InlayError(
            "the model's configuration cannot be read",
            saw=f"{folder}: {type(error).__name__}: {ascii(str(error))[1:-1][:300]}",
            do="name a folder with the config.json of a model that this version of transformers knows",
        ) from error


def class_of(config: Any, task: str | None, folder: Path) -> Any:
    """Return the transformers class for a task, or else the one the configuration names."""
    import transformers

    if task is not None:
        if task not in TASKS:
            raise InlayError(f"there is no task {task!a}", saw=f"--task {task!a}", do=near(task, TASKS))
        auto = getattr(transformers, TASKS[task])
        if type(config) not in auto._model_mapping:
            raise InlayError(
                f"this model cannot be used for {task}",
                saw=f"{folder} holds a {config.model_type}, for which transformers has no {TASKS[task]}",
                do="choose another task or model",
            )
        return auto._model_mapping[type(config)]
    names = getattr(config, "architectures", None) or [None]
    return architecture(names[0], str(folder))


def architecture(name: str | None, where: str) -> Any:
    """Return the transformers model class called `name`."""
    import transformers

    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InlayError(
            "the model's class is not one of transformers'",
            saw=f"{where} names {ascii(name)[:100]}",
            do=f"pass --task ({', '.join(TASKS)}), or use a model that transformers knows by itself",
        )
    return kind


def skeleton(kind: Any, config: Any) -> nn.Module:
    """Return the model on the meta device: every shape, no weight."""
    with torch.device("meta"):
        model: nn.Module = kind._from_config(config)
    return model


def quiet() -> None:
    """Keep transformers from saying what this program says itself, or means to do."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
