"""What the benchmarks on real tasks share: where data lies, the comparison, and what stays in `results/`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common import RESULTS, machine

from inlay_train.compare import report, table
from inlay_train.compare.engine import Result, Row

PICTURES = ("share.png", "time.png", "curves.png")
LORA = 'lora(rank=8, alpha=16.0, targets=["linear"])'


def arguments(name: str, about: str) -> argparse.Namespace:
    """Return the script's arguments; without the data's folder, say that nothing was measured and end."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("data", type=Path, nargs="?", help=f"the folder with {name}'s files")
    parser.add_argument("--work", type=Path, default=Path(f"bench-{name}"), help="where runs are kept")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--seeds", type=int, help="another number of seeds")
    given = parser.parse_args()
    if given.data is None:
        print(f"bench_{name}: not run; it needs the folder with {name}'s files as its argument")
        sys.exit(0)
    given.work.mkdir(parents=True, exist_ok=True)
    return given


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """Write rows as jsonl, the form `inlay compare` reads."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def compare(
    name: str,
    given: argparse.Namespace,
    values: Mapping[str, Any],
    stacks: Iterable[str],
    *,
    seeds: int,
    elsewhere: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compare as `inlay compare` does, and leave figures, pictures and page in `results/`.

    `elsewhere`: figures that others measured, given beside ours and marked as theirs.
    """
    output = given.work / "comparison"
    content = report.run(
        values, "; ".join(stacks), output, seeds=given.seeds or seeds, processes=given.processes, threads=1,
        **options,
    )  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(markdown(content, elsewhere or {}) + "\n")
    for row in content["rows"]:
        row.pop("losses")  # they are in the picture
    text = json.dumps(
        {
            "benchmark": name,
            **content,
            "ran": content["machine"],
            "machine": machine(),
            "elsewhere": dict(elsewhere or {}),
        },
        indent=1,
    )
    (RESULTS / f"{name}.json").write_text(text + "\n")
    for picture in PICTURES:
        shutil.copy(output / picture, RESULTS / f"{name}-{picture}")
    return content


def markdown(content: Mapping[str, Any], elsewhere: Mapping[str, str]) -> str:
    """Return the table as markdown, with what it rests on; figures of others in lines of their own."""
    fields = {field.name for field in dataclasses.fields(Row)}
    rows = [Row(**{name: row[name] for name in fields}) for row in content["rows"]]
    lines = [f"# {content['title']}", "", content["about"], "", content["machine"] + ".", ""]
    lines += ["| " + " | ".join(["stack", rows[0].metric, *table.COLUMNS[1:]]) + " |"]
    lines += ["|" + "---|" * (1 + len(table.COLUMNS))]
    for row in rows:
        stack, *others = table.cells(row)
        lines.append("| " + " | ".join([f"`{stack}`", table.measured(row), *others]) + " |")
    lines += [f"| measured elsewhere: {who} | {figure} |" + " |" * 8 for who, figure in elsewhere.items()]
    lines += [f"| `{stack}` | failed: {reason} |" + " |" * 8 for stack, reason in content["failed"].items()]
    notes = table.notes(Result(rows, content["failed"]))
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])
