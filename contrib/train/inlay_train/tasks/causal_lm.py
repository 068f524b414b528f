"""Causal language modelling: each text goes on as it does, or a target follows its prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from inlay_train.table import Table
from inlay_train.tasks.task import IGNORED, Examples, Task


class CausalLM(Task):
    """Cross-entropy of the next token, of the target alone where there is one; measured by perplexity."""

    name: ClassVar[str] = "causal-lm"
    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    shifted: ClassVar[bool] = True  # position i is what says token i + 1

    def encode(self, table: Table, tokenizer: Any, longest: int) -> Examples:
        """Return text and target joined, an end token after them where there is room for it.

        A prompt is cut at its start, to leave room for the target; then the target at its end.
        """
        rows, truncated = [], 0
        for given, target in self._pairs(table, tokenizer):
            end = [] if tokenizer.eos_token_id in (None, *target[-1:]) else [tokenizer.eos_token_id]
            learnt = [*target, *end][: max(1, longest - 1) if given else longest]
            kept = given[max(0, len(given) + len(learnt) - longest) :]
            truncated += len(given) + len(target) > longest
            rows.append({
                "input_ids": [*kept, *learnt], "attention_mask": [1] * (len(kept) + len(learnt)),
                "labels": [*[IGNORED] * len(kept), *learnt],
            })  # fmt: skip
        return Examples(rows, truncated)

    def encode_input(self, table: Table, tokenizer: Any, longest: int) -> Examples:
        """Return the texts, cut at their start."""
        ids = tokenizer(table.texts(self.columns.text), verbose=False)["input_ids"]
        rows = [{"input_ids": row[-longest:], "attention_mask": [1] * len(row[-longest:])} for row in ids]
        return Examples(rows, sum(len(row) > longest for row in ids))

    def _pairs(self, table: Table, tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (given, to learn) as tokens: a blank separates text and target; a text alone is learnt."""
        texts = tokenizer(table.texts(self.columns.text), verbose=False)["input_ids"]
        if self.columns.target is None:
            yield from (([], text) for text in texts)
            return
        targets = [f" {text.strip()}" for text in table.texts(self.columns.target)]
        yield from zip(
            texts, tokenizer(targets, add_special_tokens=False, verbose=False)["input_ids"], strict=True
        )

    def reduce(self, outputs: Any, labels: Any) -> Tensor:
        """Return (B, 2): the summed loss of each row's tokens in nats, and their number."""
        logits: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
        return torch.stack([losses.sum(1), (labels != IGNORED).sum(1).to(losses.dtype)], 1)

    def metrics(self, reduced: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        loss = float(reduced[:, 0].sum() / max(1, reduced[:, 1].sum()))
        return {"token_loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    @torch.no_grad()
    def predict(
        self, model: Any, batch: Mapping[str, Any], tokenizer: Any, longest: int
    ) -> list[dict[str, Any]]:
        width = batch["input_ids"].shape[1]
        new = model.generate(**batch, max_new_tokens=longest, do_sample=False)[:, width:]
        return [{"text": text.strip()} for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
