"""From what a user gives to a comparison: everything checked, sizes solved, rows split, before any run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from inlay import InlayError
from inlay_train import base
from inlay_train.compare.budget import fitted
from inlay_train.compare.engine import Comparison
from inlay_train.config import RunConfig, make, merged
from inlay_train.folder import base_digest, file_digest
from inlay_train.prepare import (
    FULL,
    HEAD,
    Findings,
    Prepared,
    check_targets,
    prepare,
    stack_of,
    trained_beside,
)
from inlay_train.table import Table, read

RUNNER = "inlay_train.compare.runs:run"
BASELINES = (HEAD, FULL)
ITEM = re.compile(r"""(?:[^;"']|"[^"]*"|'[^']*')+""")
CHOICE = 0.2  # of the rows to learn from: held out where rates are chosen
# Settings that a run gets from the comparison.
OWN = {
    "method",
    "seed",
    "rate",
    "output",
    "model",
    "data",
    "eval_data",
    "test_data",
    "encoding",
    "keep",
    "best",
}


def comparison(
    values: Mapping[str, Any],
    methods: str,
    output: Path,
    *,
    seeds: int = 3,
    rates: Sequence[float] = (0.3, 1.0, 3.0),
    budget: int | None = None,
    test_share: float = 0.2,
    choice: Mapping[str, Any] | None = None,
) -> Comparison:
    """Return the comparison of `methods`, separated by semicolons, with the settings `values` of a run.

    The rows of `test_data`, or a share of the data, are measured on and nothing else; rates are chosen by
    runs with the settings `choice` on the rest. Rows are copied to `output/data`. Raises one error with
    all that is wrong.
    """
    first, stacks = _checked({"held_out": CHOICE, **values}, listed(methods), output, budget)
    learn, test = _rows(first, test_share)
    folder = output / "data"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: str((folder / f"{name}.jsonl").absolute()) for name in ("learn", "test")}
    digests = {
        name: _write(rows, Path(paths[name]), first) for name, rows in (("learn", learn), ("test", test))
    }
    plain = {k: v for k, v in first.config.plain.items() if k not in OWN and v is not None}
    settings = {"config": plain, "choice": dict(choice or {}), "model": base_digest(first.folder), **digests}
    return Comparison(
        stacks, RUNNER, settings, seeds, tuple(rates), {"model": str(first.folder.absolute()), **paths}
    )


def listed(methods: str) -> list[str]:
    """Return the stacks of a list separated by semicolons."""
    stacks = [" ".join(item.split()) for item in ITEM.findall(methods) if item.strip()]
    twice = [stack for stack, count in Counter(stacks).items() if count > 1]
    if not stacks or twice:
        raise InlayError(
            "these methods cannot be compared",
            saw=f"{twice[0]!r} twice" if twice else f"no method in {methods!r}",
            do='give each once, separated by semicolons: "head; lora(rank=8); lora(rank=8) + serial_adapter"',
        )
    return stacks


def _checked(
    values: Mapping[str, Any], stacks: Sequence[str], output: Path, budget: int | None
) -> tuple[Prepared, dict[str, str]]:
    """Return what is the same for all runs, and each stack with its sizes; raise all that is wrong."""
    config, found = make(**{**values, "method": FULL, "output": output}), Findings()
    prepared = found.of(prepare, config)
    skeleton = None if prepared is None else base.skeleton(prepared.kind, prepared.model_config)
    sized = {}
    for written in stacks:
        stack = found.of(stack_of, written)
        train = trained_beside(config.task, config.train, stack, skeleton)
        sized[written] = found.of(_sized, skeleton, stack, train, written, budget or 0)
    if found.errors:
        raise merged(found.errors)
    return prepared, sized  # type: ignore[return-value]


def _sized(skeleton: nn.Module, stack: Any, train: tuple[str, ...], written: str, budget: int) -> str:
    """Return the stack to train: as it was written, or with sizes that meet the budget, if there is one."""
    check_targets(skeleton, stack, train)
    return fitted(skeleton, written, budget) if budget and written not in BASELINES else written


def _rows(prepared: Prepared, test_share: float) -> tuple[Table, Table]:
    """Return (rows to learn from, rows to measure on)."""
    config: RunConfig = prepared.config
    whole = read(config.data, encoding=config.encoding)
    if prepared.test is not None:
        return whole, prepared.test
    return prepared.task.split(whole, test_share, config.split_seed)


def _write(table: Table, path: Path, prepared: Prepared) -> str:
    """Write the columns that the task reads as jsonl; return the file's digest."""
    columns = prepared.config.columns
    wanted = (columns.text, columns.pair, columns.label, columns.target)
    names = [name for name in wanted if name is not None and name in table.columns]
    rows = zip(*(table.columns[name] for name in names), strict=True)
    text = "".join(json.dumps(dict(zip(names, row)), ensure_ascii=False, default=str) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return file_digest(path)
