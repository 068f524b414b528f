"""Everything about a run that can be found wrong before a weight is loaded, found at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import inlay
from inlay import InlayError
from inlay.authoring import Trained
from inlay.stack import Stack, parse
from inlay_train import base
from inlay_train.adapted import heads, reaches_heads
from inlay_train.config import RunConfig, from_yaml, merged, validated
from inlay_train.expression import check_installed
from inlay_train.folder import Folder
from inlay_train.precision import check_precision
from inlay_train.table import Table, read
from inlay_train.tasks import TASKS, Task

FULL, HEAD = "full", "head"
SEEN = 512  # tokens of a text that are read, where the model allows more
T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A run that may start. `stack` is None where everything is trained."""

    config: RunConfig
    folder: Path
    kind: Any
    model_config: Any
    task: Task
    learn: Table
    held: Table
    test: Table | None
    stack: Stack | None
    train: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The stack as plain data."""
        parts = () if self.stack is None else self.stack.parts
        return [{"name": p.name, "method": p.method.id, "settings": p.method.to_dict()} for p in parts]


class Findings:
    """Collects what is wrong instead of stopping at the first."""

    def __init__(self, errors: Iterable[InlayError] = ()) -> None:
        self.errors = list(errors)

    def of(self, check: Callable[..., T], *args: Any) -> T | None:
        """Return check(*args), or None if it is wrong, or if what it needs (an argument) was."""
        if any(argument is None for argument in args):
            return None
        try:
            return check(*args)
        except InlayError as error:
            self.errors.append(error)
            return None


def prepare(config: RunConfig) -> Prepared:
    """Return the run ready to start, its data read; raise one error with everything wrong with it."""
    found = Findings()
    folder = found.of(base.folder_of, config.model)
    plain = found.of(base.configuration, folder)
    kind = found.of(base.class_of, plain, config.task, folder)
    stack = found.of(stack_of, config.method)
    found.of(check_bits, config)
    found.of(check_precision, config)
    found.of(check_optimizer, config)
    learn = found.of(lambda: read(config.data, encoding=config.encoding))
    task = found.of(TASKS[config.task].of, learn, config.columns)
    learn, held, test = tables(config, task, learn, found)
    if plain is not None:
        plain.num_labels = len(task.labels) if task is not None and task.labels else 2
    skeleton = found.of(base.skeleton, kind, plain)
    train = trained_beside(config.task, config.train, stack, skeleton)
    found.of(check_targets, skeleton, stack, train)
    if found.errors:
        raise merged(found.errors)
    return Prepared(
        config,
        folder,
        kind,
        plain,
        task,
        learn,
        held,
        test,
        with_trained(stack, train),
        train,
        heads(skeleton),
    )  # type: ignore[arg-type]


def configured(options: Mapping[str, Any], file: Path | None = None, *, resume: bool = False) -> Prepared:
    """Return the run that a YAML file and options describe, or, to resume one, its folder and options.

    Where a setting is wrong, model, method and data are looked at all the same, for one error with all.
    """
    values = {**(from_yaml(file) if file is not None else {}), **options}
    if resume and "output" in values:
        values = {**Folder(Path(values["output"])).settings(values), **values}
    config, errors = validated(values)
    if config is not None:
        return prepare(config)
    found = Findings(errors)
    checks: dict[str, Callable[[str], Any]] = {
        "model": lambda model: base.configuration(base.folder_of(model)),
        "method": stack_of,
        "data": lambda data: read(data, encoding=str(values.get("encoding", "utf-8"))),
    }
    for name, check in checks.items():
        if name in values:
            found.of(check, str(values[name]))
    raise merged(found.errors)


def tables(
    config: RunConfig, task: Task | None, learn: Table | None, found: Findings
) -> tuple[Table | None, Table | None, Table | None]:
    """Return the rows to learn from, to choose the best step by, and to measure on at the end."""
    given = [
        None if path is None else found.of(lambda path=path: read(path, encoding=config.encoding))
        for path in (config.eval_data, config.test_data)
    ]
    held, test = given
    if config.eval_data is None:
        parts = found.of(
            lambda task, learn: task.split(learn, config.held_out, config.split_seed), task, learn
        )
        learn, held = parts if parts is not None else (learn, None)
    for table in given:
        found.of(lambda task, table: task.check_evaluated(table), task, table)
    return learn, held, test


def stack_of(method: str) -> Stack | bool:
    """Return the stack to attach; False where everything is trained instead."""
    if method == FULL:
        return False
    if method == HEAD:
        return Stack.of(Trained())
    check_installed(method)
    return parse(method)


def trained_beside(
    task: str, train: tuple[str, ...] | None, stack: Stack | bool | None, skeleton: nn.Module | None
) -> tuple[str, ...]:
    """Return the targets whose own tensors learn beside the stack: the task's, unless it reaches them."""
    default = TASKS[task].train
    if train is not None or not default or not isinstance(stack, Stack) or skeleton is None:
        return default if train is None else train
    try:
        return () if reaches_heads(skeleton, stack) else default
    except InlayError:
        return default  # what is wrong with the stack is told by itself


def with_trained(stack: Stack | bool | None, train: tuple[str, ...]) -> Stack | None:
    """Return the whole stack, the base's own tensors innermost: a method that acts there too adds."""
    if not isinstance(stack, Stack):
        return None
    return Trained(targets=train) + stack if train else stack


def check_targets(skeleton: nn.Module, stack: Stack | bool, train: tuple[str, ...]) -> None:
    """Raise if a target of the stack does not occur in the model."""
    if isinstance(stack, Stack):
        inlay.plan(skeleton, stack, train=train)


def check_bits(config: RunConfig) -> None:
    if config.bits is None:
        return
    if config.method == FULL:
        raise InlayError(
            "a quantised model cannot be trained as a whole",
            saw=f"--bits {config.bits} --method full",
            do="give a method, or leave out --bits",
        )
    if find_spec("bitsandbytes") is None:
        raise InlayError(
            "a quantised base needs bitsandbytes",
            saw=f"--bits {config.bits}, and no such package",
            do="pip install bitsandbytes",
        )


def check_optimizer(config: RunConfig) -> None:
    """Raise if the optimizer cannot work as its name says: bitsandbytes itself would go on without pages."""
    if config.optimizer == "adamw":
        return
    if find_spec("bitsandbytes") is None:
        raise InlayError(
            "the optimizer needs bitsandbytes",
            saw=f"--optimizer {config.optimizer}, and no such package",
            do="pip install bitsandbytes, or leave out --optimizer",
        )
    if config.optimizer.startswith("paged") and not torch.cuda.is_available():
        raise InlayError(
            "a paged optimizer needs a CUDA device, whose memory its state moves in and out of",
            saw=f"--optimizer {config.optimizer}, and no CUDA device",
            do=f"give --optimizer {config.optimizer.removeprefix('paged_')}: the same steps, not paged",
        )


def longest(config: RunConfig, model_config: Any, tokenizer: Any) -> int:
    """Return how many tokens of a text are read: what was asked for, within what the model allows."""
    limits = [tokenizer.model_max_length, getattr(model_config, "max_position_embeddings", None)]
    allowed = min(limit for limit in (*limits, 1 << 30) if limit)
    if config.max_length is not None and config.max_length > allowed:
        raise InlayError(
            "texts cannot be read to a length that the model or its tokenizer was not made for",
            saw=f"--max-length {config.max_length}; the tokenizer's limit is {limits[0]:,}, "
            f"the model's {limits[1] or 'unknown'}",
            do=f"give --max-length {allowed} or less",
        )
    return min(config.max_length or SEEN, allowed)
