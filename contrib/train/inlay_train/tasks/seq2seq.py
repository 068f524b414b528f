"""Sequence to sequence: an encoder reads a text, a decoder writes its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from inlay_train.table import Table
from inlay_train.tasks.causal_lm import CausalLM
from inlay_train.tasks.task import Columns, Examples, encoded


class Seq2Seq(CausalLM):
    """Cross-entropy of the target's tokens, given the text; measured by perplexity."""

    name: ClassVar[str] = "seq2seq"
    shifted: ClassVar[bool] = False

    def __init__(self, columns: Columns, labels: Any = ()) -> None:
        super().__init__(replace(columns, target=columns.target or "target"), labels)

    def encode(self, table: Table, tokenizer: Any, longest: int) -> Examples:
        texts, cut = encoded(tokenizer, longest, table.texts(self.columns.text))
        wanted = table.texts(str(self.columns.target))
        targets, target_cut = encoded(tokenizer, longest, text_target=wanted)
        columns = {**texts, "labels": targets["input_ids"]}
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        return Examples(rows, sum(map(max, cut, target_cut)))

    def encode_input(self, table: Table, tokenizer: Any, longest: int) -> Examples:
        columns, cut = encoded(tokenizer, longest, table.texts(self.columns.text))
        return Examples([dict(zip(columns, row)) for row in zip(*columns.values())], sum(cut))

    @torch.no_grad()
    def predict(
        self, model: Any, batch: Mapping[str, Any], tokenizer: Any, longest: int
    ) -> list[dict[str, Any]]:
        new = model.generate(**batch, max_new_tokens=longest, do_sample=False)
        return [{"text": text.strip()} for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
