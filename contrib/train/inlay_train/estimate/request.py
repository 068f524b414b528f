"""What is to be estimated: settings, found right or wrong before anything is built."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from inlay import InlayError
from inlay.errors import near
from inlay.stack import Stack
from inlay_train import base
from inlay_train.prepare import FULL, check_targets, stack_of, trained_beside, with_trained

DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
QUANTISED = ("nf4", "nf4-double", "fp4", "int8")
OF_BITS = {4: "nf4-double", 8: "int8"}  # what `inlay train --bits` makes
OPTIMIZERS = ("adamw", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
DEVICES = ("cpu", "cuda")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "K": 2**10, "M": 2**20,
         "G": 2**30, "T": 2**40, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One training step: of which model, with what attached, on how many tokens, done how."""

    model: str
    method: str
    batch: int = 8
    length: int = 512
    target_length: int | None = None  # of what an encoder-decoder writes; None: `length`
    task: str | None = None  # None: that of the model's own class
    train: tuple[str, ...] | None = None  # the base's own tensors that learn too; None: the task's
    labels: int = 2
    dtype: str = "float32"
    quantize: str | None = None
    optimizer: str = "adamw"
    checkpointing: bool = False
    accumulate: int = 1
    padded: bool = False
    processes: int = 1
    fsdp: bool = False
    device: str = "cpu"

    def check(self) -> None:
        """Raise if a setting cannot be."""
        for name in ("batch", "length", "target_length", "labels", "accumulate", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InlayError(
                    f"{_option(name)} counts from 1",
                    saw=f"{_option(name)} {value}",
                    do="give 1 or more",
                )
        _among("dtype", self.dtype, tuple(DTYPES))
        _among("optimizer", self.optimizer, OPTIMIZERS)
        _among("device", self.device, DEVICES)
        if self.quantize is not None:
            _among("quantize", self.quantize, QUANTISED)
        self._check_quantised()
        self._check_bitsandbytes()
        self._check_sharded()

    def _check_sharded(self) -> None:
        if self.fsdp and self.processes == 1:
            raise InlayError(
                "one process has nothing to shard with",
                saw="--fsdp --processes 1",
                do="give --processes, or leave out --fsdp",
            )

    def _check_quantised(self) -> None:
        if self.quantize is not None and self.method == FULL:
            raise InlayError(
                "a quantised model cannot be trained as a whole",
                saw=f"--quantize {self.quantize} --method full",
                do="give a method, or leave out --quantize",
            )

    def _check_bitsandbytes(self) -> None:
        """Raise if the step needs bitsandbytes' own code, which is not here: it is what is counted."""
        wanted = [f"--quantize {self.quantize}"] if self.quantize is not None else []
        wanted += [f"--optimizer {self.optimizer}"] if self.optimizer not in ("adamw", "sgd") else []
        if wanted and find_spec("bitsandbytes") is None:
            raise InlayError(
                "what it costs is counted on bitsandbytes' own layers and optimizers",
                saw=f"{' '.join(wanted)}, and no such package",
                do="pip install bitsandbytes",
            )


@dataclass(frozen=True)
class Read:
    """What the request's model and method turn out to be. `stack` is None where everything is trained."""

    kind: Any
    config: Any
    task: str
    stack: Stack | None
    parameters: int  # of the base


def read(request: Request) -> Read:
    """Return model class, configuration, task and stack, as `inlay train` has them; raise if any is wrong."""
    request.check()
    folder = config_folder(request.model)
    config = base.configuration(folder, num_labels=request.labels)
    task = request.task
    if task is None and not getattr(config, "architectures", None):
        task = "causal-lm"  # a configuration alone does not say
    kind = base.class_of(config, task, folder)
    task = task or _task_of(kind, request.model)
    _check_length(request, config)
    stack, skeleton = stack_of(request.method), base.skeleton(kind, config)
    train = trained_beside(task, request.train, stack, skeleton)
    check_targets(skeleton, stack, train)
    parameters = sum(p.numel() for p in skeleton.parameters())
    return Read(kind, config, task, with_trained(stack, train), parameters)


def config_folder(model: str) -> Path:
    """Return the folder of a model's name, or the configuration file itself where one is given."""
    return Path(model) if Path(model).is_file() else base.folder_of(model)


def bytes_of(text: str) -> int:
    """Return the bytes that a text like "24GiB" stands for."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if (
        found is None
        or found[2].upper() not in UNITS
        or not (size := float(found[1]) * UNITS[found[2].upper()])
    ):
        raise InlayError(
            "this is no amount of memory", saw=f"--memory {text!a}", do="write it as 24GiB or 80GB"
        )
    return int(size)


def quantisation(name: str | None, bits: int | None) -> str | None:
    """Return how the base is kept, named or given in bits."""
    if bits is None:
        return name
    if name is not None:
        raise InlayError(
            "how the base is kept is given twice",
            saw=f"--quantize {name} --bits {bits}",
            do="leave one of them out",
        )
    if bits not in OF_BITS:
        raise InlayError("bits has a value it cannot have", saw=f"--bits {bits}", do="choose 4 or 8")
    return OF_BITS[bits]


def _task_of(kind: Any, where: str) -> str:
    """Return the task that a class of transformers is for."""
    import transformers

    for task, auto in base.TASKS.items():
        if kind in getattr(transformers, auto)._model_mapping.values():
            return task
    raise InlayError(
        "the model's class has no loss to train by",
        saw=f"{where!a} names {kind.__name__}",
        do=f"pass --task ({', '.join(base.TASKS)})",
    )


def _check_length(request: Request, config: Any) -> None:
    most = getattr(config, "max_position_embeddings", None)
    longest = max(request.length, request.target_length or 0)
    if isinstance(most, int) and 0 < most < longest:
        name = "--length" if longest == request.length else "--target-length"
        raise InlayError(
            "the texts are longer than the model's positions",
            saw=f"{name} {longest:,}, and max_position_embeddings is {most:,}",
            do=f"give {name} {most} or less",
        )


def _among(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InlayError(
            f"{name} has a value it cannot have", saw=f"{_option(name)} {value!a}", do=near(value, allowed)
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
