"""Predictions with what a run left in its output folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import inlay
from inlay import InlayError
from inlay_train import base, loading
from inlay_train.adapted import heads
from inlay_train.folder import TASK
from inlay_train.quantised import FewBits
from inlay_train.table import read
from inlay_train.tasks import TASKS, Columns

KINDS = (".csv", ".tsv", ".jsonl")


class Predictor:
    """The model of a finished run, its adapter loaded."""

    def __init__(self, folder: Path, model: str | None = None) -> None:
        facts = self._facts(folder)
        self.task = TASKS[facts["task"]](Columns(**facts["columns"]), facts["labels"])
        self.longest = facts["max_length"]
        where = base.folder_of(model or facts["base"]) if facts["adapter"] else folder
        self.tokenizer = loading.tokenizer(where)
        settings = self.task.config(self.tokenizer)
        config = base.configuration(where, **settings)
        kind = base.class_of(config, self.task.name, where)
        self.model: Any = loading.model(
            where, kind, seed=facts["seed"], settings=settings, dtype=facts["dtype"],
            few_bits=None if facts["few_bits"] is None else FewBits(**facts["few_bits"]),
            heads=heads(base.skeleton(kind, config)),
        )  # fmt: skip
        if facts["adapter"]:
            inlay.load(self.model, folder, trainable=False)
        self.model.eval()
        if torch.cuda.is_available() and facts["few_bits"] is None:
            self.model.to("cuda")

    def _facts(self, folder: Path) -> dict[str, Any]:
        try:
            return dict(json.loads((folder / TASK).read_bytes()))
        except (OSError, ValueError) as error:
            raise InlayError(
                "this is not the output folder of a finished run",
                saw=f"{folder / TASK}: {error}",
                do="give the folder that `inlay train` wrote; `inlay train --resume` finishes a run",
            ) from error

    def rows(
        self, data: Path, *, encoding: str = "utf-8", batch: int = 32, new: int = 64
    ) -> list[dict[str, Any]]:
        """Return a row of predictions for each row of a file, in its order."""
        examples = self.task.encode_input(read(data, encoding=encoding), self.tokenizer, self.longest)
        self.tokenizer.padding_side = "left" if self.task.name == "causal-lm" else self.tokenizer.padding_side
        order = sorted(range(len(examples)), key=lambda i: examples.lengths[i])
        found: dict[int, dict[str, Any]] = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            padded = self.tokenizer.pad([examples[i] for i in chosen], return_tensors="pt").to(
                self.model.device
            )
            found |= dict(
                zip(chosen, self.task.predict(self.model, padded, self.tokenizer, new), strict=True)
            )
        return [found[i] for i in range(len(examples))]


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write predictions as the file's ending says."""
    if path.suffix not in KINDS:
        raise InlayError(
            "predictions are not written as this kind of file",
            saw=f"{path.name} ends in {path.suffix!r}",
            do=f"give a file that ends in {', '.join(KINDS)}",
        )
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
