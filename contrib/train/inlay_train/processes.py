"""A run in several processes, as accelerate and torchrun start them: one speaks and writes for all."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

from inlay import InlayError

T = TypeVar("T")
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LOST = re.compile(r"SIGTERM|gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed ?out", re.DOTALL)


class Everywhere(InlayError):  # noqa: N818 - says where it is raised
    """An error that all processes raise at once; the first of them tells it."""


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def number() -> int:
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    return number() == 0


def tells(error: BaseException) -> bool:
    """Return whether this process is the one to tell of an error."""
    return is_main() or not isinstance(error, Everywhere)


def join() -> None:
    """Meet the other processes, if this one was started as one of several."""
    _check_launch()
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=on_cpu())


def on_cpu() -> bool:
    """Return whether several processes must be told that they compute on the CPU: accelerate asks for it.

    (Else each of them would train by itself.)
    """
    import torch

    wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return count() > 1 and (wanted or not torch.accelerator.is_available())


def leave() -> None:
    """Part from the other processes."""
    if count() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _check_launch() -> None:
    """Refuse to be the only one of several processes asked for: `accelerate launch --cpu` starts one."""
    launched = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys()
    if launched and "WORLD_SIZE" not in os.environ and not any(name in os.environ for name in MPI):
        raise InlayError(
            "several processes were asked for, and one was started",
            saw="MASTER_PORT, and no WORLD_SIZE: accelerate launch --cpu starts several through MPI alone",
            do="torchrun --nproc-per-node 2 -m inlay train ..., "
            "or accelerate launch --multi_gpu --num_processes 2 -m inlay train ...",
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise InlayError(
            "inlay train does not shard models yet: it could not go back to a checkpoint of one",
            saw="ACCELERATE_USE_FSDP=true",
            do="choose distributed_type MULTI_GPU, or shard in a loop of your own: docs/distributed.md",
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            raise InlayError(
                "DeepSpeed was asked for and is not installed",
                saw="ACCELERATE_USE_DEEPSPEED=true, and no package deepspeed",
                do="pip install deepspeed, or choose another distributed_type: accelerate config",
            )


def gathered(value: T) -> list[T]:
    """Return every process's value, in their order."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def together(step: Callable[[], T]) -> T:
    """Return `step()`, or raise in all processes if it is wrong in one."""
    if count() == 1:
        return step()
    wrong: InlayError | None = None
    result: Any = None
    try:
        result = step()
    except InlayError as error:
        wrong = error
    errors = gathered(wrong)
    if any(errors):
        raise _joined(errors) from wrong
    return result  # type: ignore[no-any-return]


def _joined(errors: list[InlayError | None]) -> Everywhere:
    """Return what the processes say as one error: all the same, or whose it is."""
    said = [error for error in errors if error is not None]
    if len({str(error) for error in errors}) == 1:
        return Everywhere(said[0].what, saw=said[0].saw, do=said[0].do)
    where = ", ".join(str(i) for i, error in enumerate(errors) if error is not None)
    return Everywhere(
        f"process {where} of {len(errors)} cannot take part: {said[0].what}", saw=said[0].saw, do=said[0].do
    )


@contextmanager
def of_main(enter: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Hold a context in the main process; where it cannot be entered, that is an error in all."""
    with ExitStack() as stack:
        together(lambda: stack.enter_context(enter()) if is_main() else None)
        yield


def agree(facts: Mapping[str, str]) -> None:
    """Raise in all processes, naming the differences, if they are not about to do the same."""
    if count() > 1:
        from inlay.distributed import agree

        together(lambda: agree(facts))


@contextmanager
def noticing(told: Callable[[], str]) -> Iterator[None]:
    """Say what to do, `told()`, where another process ended: connections break, or the launcher ends all."""
    if count() == 1:
        yield
        return
    try:
        with _listening():
            yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise InlayError(
            "another process of this run has ended, and so does this one",
            saw=f"process {number()} of {count()}: {' '.join(str(error).split())[:200]}",
            do=told(),
        ) from error


@contextmanager
def _listening() -> Iterator[None]:
    """Let the launcher's SIGTERM be an error that can be told."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only a main thread hears signals
        return
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ended(signal_number: int, frame: Any) -> None:
    raise RuntimeError("SIGTERM, by which a launcher ends the others")
