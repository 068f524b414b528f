"""Classification: a label for each text, or pair of texts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from inlay import InlayError
from inlay.errors import near
from inlay_train.table import Table
from inlay_train.tasks.task import Columns, Examples, Task, encoded


class Classification(Task):
    """Cross-entropy over the labels that occur in training; measured by accuracy."""

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    train: ClassVar[tuple[str, ...]] = ("head",)

    @classmethod
    def of(cls, table: Table, columns: Columns) -> Classification:
        task = cls(columns, sorted({*table.labels(columns.label)}))
        task.texts(table)
        if len(task.labels) == 1:
            raise InlayError(
                "there is nothing to tell apart: the data has one label only",
                saw=f"{len(table)} rows labelled {task.labels[0]!r}",
                do="give data with at least two labels, or name another column with --label",
            )
        return task

    def split(self, table: Table, share: float, seed: int) -> tuple[Table, Table]:
        """Return (learnt from, held out), the same share of every label; a label's only row is learnt."""
        draw = random.Random(seed)
        found = table.labels(self.columns.label)
        held: list[int] = []
        for label in self.labels:
            own = [i for i, known in enumerate(found) if known == label]
            draw.shuffle(own)
            held += own[: min(len(own) - 1, max(1, round(share * len(own))))]
        if not held:
            raise InlayError(
                "nothing can be held out: every label has a single row",
                saw=f"{len(table)} rows with {len(self.labels)} labels; --label {self.columns.label}",
                do="name another column with --label, or give --eval-data",
            )
        kept = sorted({*range(len(found))} - {*held})
        return table.rows(kept), table.rows(sorted(held))

    def check_evaluated(self, table: Table) -> None:
        self.texts(table)
        found = table.labels(self.columns.label)
        unseen = Counter(label for label in found if label not in self.labels)
        if unseen:
            label, _ = unseen.most_common(1)[0]
            line = table.lines[found.index(label)]
            raise InlayError(
                "labels to evaluate on do not occur in training",
                saw=f"{', '.join(f'{n!r} in {c} rows' for n, c in unseen.most_common(5))}; "
                f"{label!r} first in line {line} of {table.path.name}",
                do=near(label, self.labels),
            )

    def config(self, tokenizer: Any) -> dict[str, Any]:
        known = {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {n: i for i, n in enumerate(self.labels)},
        }
        return {**super().config(tokenizer), **known}

    def encode(self, table: Table, tokenizer: Any, longest: int) -> Examples:
        examples = self.encode_input(table, tokenizer, longest)
        numbers = {label: number for number, label in enumerate(self.labels)}
        for row, label in zip(examples.rows, table.labels(self.columns.label), strict=True):
            row["labels"] = numbers[label]
        return examples

    def encode_input(self, table: Table, tokenizer: Any, longest: int) -> Examples:
        columns, cut = encoded(tokenizer, longest, *self.texts(table))
        return Examples([dict(zip(columns, row)) for row in zip(*columns.values())], sum(cut))

    def collator(self, tokenizer: Any) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def reduce(self, outputs: Any, labels: Any) -> Tensor:
        logits: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return logits.argmax(-1)

    def metrics(self, reduced: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"accuracy": float((reduced == labels).mean())}

    @torch.no_grad()
    def predict(
        self, model: Any, batch: Mapping[str, Any], tokenizer: Any, longest: int
    ) -> list[dict[str, Any]]:
        best = model(**batch).logits.float().softmax(-1).max(-1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"label": self.labels[i], "probability": round(p, 6)} for i, p in pairs]
