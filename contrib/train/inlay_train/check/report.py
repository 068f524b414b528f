"""A check told on a terminal: a bar while it runs, then a line for each rule, then what failed and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from inlay_train.check.engine import Event, Heard
from inlay_train.check.outcome import WORDS, Line, Outcome
from inlay_train.known import printable

STYLES = {"failed": "bold red", "excused": "yellow", "unchecked": "yellow", "passed": "green", "other": "dim"}
COUNTED = {"failed": "failed", "excused": "excused", "unchecked": "not checked", "other": "not applicable"}
GUIDE = "docs/conformance.md"


@contextmanager
def progress_on(console: Console) -> Iterator[Heard]:
    """Yield what to tell each event to; nothing is drawn where the console is no terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        tests: dict[str, Event] = {}

        def heard(event: Event) -> None:
            if event["event"] == "collected":
                tests.update((item["id"], item) for item in event["items"])
                bar.update(task, total=len(tests))
            elif event["event"] == "started":
                item = tests[event["id"]]
                bar.update(task, description=f"{item['rule']} {item['class']}")
            elif event["event"] == "result":
                bar.advance(task)

        yield heard


def tell(outcome: Outcome, console: Console) -> None:
    """Print the report."""
    _head(outcome, console)
    for where, text in outcome.gathered.broken.items():
        console.print(Text(f"{printable(where)} could not be loaded:", style=STYLES["failed"]))
        console.print(Padding(Text(_lines(text)), (0, 0, 1, 2)))
    if not outcome.gathered.classes:
        console.print("nothing was checked")
        return
    console.print(_table(outcome))
    for line in outcome.lines:
        for result in line.failures():
            console.print(_failure(line, result))
    _foot(outcome, console)


def _head(outcome: Outcome, console: Console) -> None:
    target = outcome.target
    name = f"{target.package} {target.version}" if target.package else target.name
    console.print(Text(name, style="bold"))
    declared = [n for n, kind in outcome.gathered.classes.items() if kind["derived"] is None]
    lines = [f"{', '.join(declared)}: {target.whence}"] if declared else []
    lines += [f"{kind}: derived, as no class is declared: {_facts(facts)}"
              for kind, facts in outcome.derived.items()]  # fmt: skip
    console.print(Text("".join(f"  {printable(line)}\n" for line in lines)))


def _facts(facts: Mapping[str, Any]) -> str:
    """Return what was derived in one line."""
    count, merges = len(facts["configurations"]), facts["merges"]
    said = {
        f"{count} configuration{'s' * (count > 1)}, on {', '.join(facts['families'])}": True,
        f"merges: {merges if isinstance(merges, str) else 'yes' if merges else 'no'}": True,
        "merging adds biases": facts["adds_biases"],
        "it replaces the base's values": facts["replaces"],
        f"rounds at the start ({facts['start_tolerance']:g})": facts["start_tolerance"],
        "not limited to layers": not facts["by_layer"],
        "not on a base in few bits": not facts["quantised"],
    }
    return "; ".join(text for text, holds in said.items() if holds)


def _table(outcome: Outcome) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for line in outcome.lines:
        word = Text(WORDS[line.outcome], style=STYLES[line.outcome])
        table.add_row(line.rule, word, Text("\n".join([line.title, *_reasons(line)])))
    return table


def _reasons(line: Line) -> Iterator[str]:
    every = {result["class"] for result in line.results}
    for reason, classes in line.reasons().items():
        of = "" if set(classes) == every else f"{', '.join(dict.fromkeys(classes))}: "
        yield f"  {printable(of + reason)}"


def _failure(line: Line, result: Mapping[str, Any]) -> Padding:
    found = result["found"]
    said = {"saw": found["saw"], "at": found["at"], "means": line.means, "example": found["example"],
            "usually": line.usually, "see": f"{GUIDE}#{line.rule.lower()}"}  # fmt: skip
    title = Text(f"{line.rule} failed: {line.title} ({result['class']})", style=STYLES["failed"])
    table = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left")
    for name, text in said.items():
        if text:
            table.add_row(f"  {name}", Text(_lines(text)))
    return Padding(table, (1, 0, 0, 0))


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.splitlines()))


def _foot(outcome: Outcome, console: Console) -> None:
    counts = outcome.counts
    checked = counts["passed"] + counts["failed"]
    parts = [f"{counts['passed']} of {checked} rules passed"]
    parts += [f"{counts[word]} {said}" for word, said in COUNTED.items() if counts[word]]
    style = STYLES["passed" if outcome.good else "failed"]
    console.print(Text(f"\n{', '.join(parts)}", style=style), end="")
    many = "1 process" if outcome.processes == 1 else f"{outcome.processes} processes"
    console.print(f"; {outcome.seconds:.0f} s in {many}, examples: {outcome.profile}", markup=False)
