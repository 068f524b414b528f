"""TREC: which of six kinds of answer a question asks for; 5,452 questions to learn from, 500 to test.

Stacks beside full fine-tuning of the same packaged MiniLM, three seeds each. Learning rates are chosen
between each method's own and twice that, by runs of one epoch on four fifths of the training questions,
never on the test questions; the last step counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from comparing import LORA, arguments, compare, write_rows

from inlay_train import encoder

STACKS = (
    "full", LORA, "ia3", "p_tuning_v2(length=16)", f"{LORA} + serial_adapter(rank=24)",
)  # fmt: skip
ELSEWHERE = {
    "full fine-tuning, lr 5e-5, 3 epochs": "96.6 %", "peft, LoRA": "93.8 %", "peft, (IA)^3": "95.2 %",
    "peft, prefix tuning": "92.0 %",
}  # fmt: skip


def questions(file: Path) -> Iterator[dict[str, str]]:
    """Yield each question with its coarse label."""
    for line in file.read_text(encoding="latin-1").splitlines():
        label, _, text = line.partition(" ")
        yield {"label": label.partition(":")[0], "text": text.strip()}


def main() -> None:
    given = arguments("trec", __doc__ or "")
    learn = write_rows(given.work / "learn.jsonl", questions(given.data / "train_5500.label"))
    test = write_rows(given.work / "test.jsonl", questions(given.data / "TREC_10.label"))
    values = {
        "model": str(encoder.folder()), "data": learn, "test_data": test, "task": "classification",
        "epochs": 3, "batch": 32, "by_length": True,
    }  # fmt: skip
    compare(
        "trec", given, values, STACKS, seeds=3, rates="1 2", choice={"epochs": 1},
        title="TREC questions: stacks on MiniLM compared", elsewhere=ELSEWHERE,
    )  # fmt: skip


if __name__ == "__main__":
    main()
