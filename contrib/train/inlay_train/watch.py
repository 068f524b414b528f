"""What goes on beside training: a progress bar, the time of steps, and a way to stop."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from inlay_train import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 5.0  # seconds


class Stopped(BaseException):
    """Training was asked to stop and has saved; `signal` says by what."""

    def __init__(self, signal: int, step: int) -> None:
        self.signal, self.step = signal, step
        super().__init__(f"stopped after step {step}")


class Watch(TrainerCallback):
    """Shows progress, times steps, and stops at the end of a step when asked to."""

    def __init__(self, console: Console, metric: str) -> None:
        self.console, self.metric = console, metric
        self.asked: int | None = None
        self.times: list[float] = []
        self.before = 0.0  # seconds of training before this process went on
        self._began = self._heard = 0.0
        self._bar: Any = None
        self._task: Any = None

    @property
    def step_seconds(self) -> float:
        """The median time of a step of this process, evaluation left out."""
        return statistics.median(self.times) if self.times else 0.0

    @property
    def seconds(self) -> float:
        """The time all steps took."""
        return self.before + sum(self.times)

    # -- transformers' events ------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known = [logs["seconds"] for logs in state.log_history if "seconds" in logs]
        if known and not self.times:
            self.before = known[-1]
        if self._bar is not None:
            self._task = self._bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, told=""
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter() - self._began)
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
        self.asked = max(processes.gathered(self.asked), key=lambda asked: asked or 0)
        if self.asked is not None:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        state.log_history[-1]["seconds"] = round(self.seconds, 3)
        if self._bar is not None and "loss" in logs:
            self._bar.update(self._task, told=f"loss {logs['loss']:.3f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        value = metrics.get(f"eval_{self.metric}")
        if value is not None and self._bar is not None:
            self._bar.console.print(f"step {state.global_step:,}: {self.metric} {value:.4g}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked is not None:
            processes.gathered(None)  # the first one has written: a launcher ends all with the first to go
            raise Stopped(self.asked, state.global_step)

    # -- around training -----------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show the bar, and take Ctrl-C as a wish to save and stop; a second one stops at once."""
        told = TextColumn("{task.fields[told]}")
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), told, TimeRemainingColumn())
        with (
            self._listening(),
            Progress(*columns, console=self.console, disable=self.console.quiet) as self._bar,
        ):
            yield

    @contextmanager
    def _listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only a main thread hears signals
            return
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            if processes.count() > 1 and time.monotonic() < self._heard + PATIENCE:
                return  # the same wish: a terminal and a launcher both hand it on
            raise KeyboardInterrupt
        self.asked, self._heard = number, time.monotonic()
        self.console.print("stopping after this step, to save; once more stops at once")
