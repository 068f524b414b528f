"""SST-2: whether a sentence of a film review praises; 6,919 sentences to learn from, 1,820 to test.

Stacks beside full fine-tuning of the packaged MiniLM, one seed, one epoch. Learning rates are chosen as for
TREC, by runs of a quarter of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from comparing import LORA, arguments, compare, write_rows

from inlay_train import encoder

STACKS = ("full", LORA, "p_tuning_v2(length=16)", f"{LORA} + serial_adapter(rank=24)")


def sentences(file: Path) -> Iterator[dict[str, str]]:
    """Yield each sentence with its label."""
    for line in file.read_text(encoding="utf-8").splitlines():
        text, _, label = line.rpartition("\t")
        yield {"label": label, "text": text}


def main() -> None:
    given = arguments("sst2", __doc__ or "")
    learn = write_rows(given.work / "learn.jsonl", sentences(given.data / "train.tsv"))
    test = write_rows(given.work / "test.jsonl", sentences(given.data / "test.tsv"))
    values = {
        "model": str(encoder.folder()), "data": learn, "test_data": test, "task": "classification",
        "epochs": 1, "batch": 32, "by_length": True,
    }  # fmt: skip
    compare(
        "sst2", given, values, STACKS, seeds=1, rates="1 2", choice={"epochs": 0.25},
        title="SST-2 sentences: stacks on MiniLM compared",
    )  # fmt: skip


if __name__ == "__main__":
    main()
