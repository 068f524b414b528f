"""`Task`: what a kind of training needs of data, model and metric."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from inlay import InlayError
from inlay_train.table import Table

IGNORED = -100  # a label that transformers' losses leave out


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. `pair` is a second text beside the first; `target` what follows it."""

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    target: str | None = None


class Examples(Dataset[dict[str, Any]]):
    """Encoded rows, each the arguments of one model call without the padding; `truncated` were cut."""

    def __init__(self, rows: Sequence[dict[str, Any]], truncated: int) -> None:
        self.rows, self.truncated = rows, truncated

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        return [len(row["input_ids"]) for row in self.rows]


class Task(ABC):
    """A kind of training, with what it learnt of the data (`facts`, plain data that is saved)."""

    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    train: ClassVar[tuple[str, ...]] = ()  # the base's own tensors that learn beside a method

    def __init__(self, columns: Columns, labels: Sequence[str] = ()) -> None:
        self.columns, self.labels = columns, tuple(labels)

    @classmethod
    def of(cls, table: Table, columns: Columns) -> Task:
        """Return the task of learning from this table, after a look at the cells it will use."""
        task = cls(columns)
        task.texts(table)
        return task

    @property
    def facts(self) -> dict[str, Any]:
        return {"task": self.name, "columns": asdict(self.columns), "labels": list(self.labels)}

    def split(self, table: Table, share: float, seed: int) -> tuple[Table, Table]:
        """Return (learnt from, held out): a share of the rows drawn by `seed`, at least one of each."""
        order = list(range(len(table)))
        random.Random(seed).shuffle(order)
        out = max(1, round(share * len(order)))
        if len(order) < 2:
            raise InlayError(
                "one row cannot be split into rows to learn from and rows held out",
                saw=f"{len(table)} row in {table.path.name}",
                do="give more data, or --eval-data",
            )
        return table.rows(sorted(order[out:])), table.rows(sorted(order[:out]))

    def check_evaluated(self, table: Table) -> None:
        """Raise if rows to evaluate on cannot be: their columns, their labels."""
        self.texts(table)

    def config(self, tokenizer: Any) -> dict[str, Any]:
        """Return what the model's configuration must say, given its tokenizer."""
        return {"pad_token_id": tokenizer.pad_token_id}

    def texts(self, table: Table) -> list[list[str]]:
        """Return the columns of text that the task reads."""
        names = (self.columns.text, self.columns.pair, self.columns.target)
        return [table.texts(name) for name in names if name is not None]

    @abstractmethod
    def encode(self, table: Table, tokenizer: Any, longest: int) -> Examples:
        """Return the rows with their labels as tokens, cut at `longest`."""

    @abstractmethod
    def encode_input(self, table: Table, tokenizer: Any, longest: int) -> Examples:
        """Return the rows without labels, as what a prediction starts from."""

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what makes a padded batch of examples."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    @abstractmethod
    def reduce(self, outputs: Any, labels: Any) -> Any:
        """Return what the metrics need of a batch's outputs, so that logits are not kept."""

    @abstractmethod
    def metrics(self, reduced: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the metrics over all batches."""

    @abstractmethod
    def predict(
        self, model: Any, batch: Mapping[str, Any], tokenizer: Any, longest: int
    ) -> list[dict[str, Any]]:
        """Return a dictionary of predictions for each row of a batch that `encode_input` encoded."""


def encoded(tokenizer: Any, longest: int, *texts: list[str], **how: Any) -> tuple[Any, list[bool]]:
    """Return the tokenizer's encoding, cut at `longest` tokens, and which rows were cut."""
    whole = tokenizer(*texts, verbose=False, **how)["input_ids"]
    return tokenizer(*texts, truncation=True, max_length=longest, **how), [
        len(ids) > longest for ids in whole
    ]
