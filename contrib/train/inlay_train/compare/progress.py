"""A comparison as it goes on, told on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from inlay_train.compare.processes import Told
from inlay_train.compare.store import Job, Outcome
from inlay_train.compare.table import number, seconds

Phase = Callable[[str, int], None]


@contextmanager
def shown_on(console: Console) -> Iterator[tuple[Told, Phase]]:
    """Yield what to call after each run, and at the start of each phase: a line a run above a bar."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:

        def phase(name: str, runs: int) -> None:
            for task in bar.task_ids:
                bar.remove_task(task)
            if runs:
                bar.add_task(name, total=runs)

        def done(job: Job, outcome: Outcome | str) -> None:
            console.print(f"  {escape(told(job, outcome))}")
            for task in bar.task_ids:
                bar.advance(task)

        yield done, phase


def told(job: Job, outcome: Outcome | str) -> str:
    """Return a run in one line."""
    if isinstance(outcome, str):
        return f"{job}: failed: {outcome}"
    value = number(outcome.value, outcome.metric)
    return f"{job}: {outcome.metric} {value}, {seconds(outcome.seconds)}"
