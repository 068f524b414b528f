"""Tasks: labels, splits, tokens, what is cut, and the metrics."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inlay import InlayError
from inlay_train import loading
from inlay_train.table import Table
from inlay_train.tasks import CausalLM, Classification, Columns, Seq2Seq


def table(**columns: list[Any]) -> Table:
    count = len(next(iter(columns.values())))
    return Table(Path("data.csv"), columns, range(2, count + 2))


@pytest.fixture
def tokenizer(models: dict[str, Path]) -> Any:
    return loading.tokenizer(models["bert"])


@pytest.fixture
def decoder(models: dict[str, Path]) -> Any:
    return loading.tokenizer(models["llama"])


def test_classes_are_the_labels_in_order() -> None:
    data = table(text=list("abcd"), label=["y", "x", "y", "x"])
    task = Classification.of(data, Columns())
    assert task.labels == ("x", "y")
    assert task.facts == {
        "task": "classification", "labels": ["x", "y"],
        "columns": {"text": "text", "pair": None, "label": "label", "target": None},
    }  # fmt: skip


def test_the_same_share_of_every_label_is_held_out() -> None:
    labels = ["a"] * 80 + ["b"] * 20 + ["c"] * 3 + ["d"]
    data = table(text=[str(i) for i in range(104)], label=labels)
    task = Classification.of(data, Columns())
    kept, held = task.split(data, 0.1, 0)
    assert Counter(held.labels("label")) == {"a": 8, "b": 2, "c": 1}
    assert len(kept) == 93
    assert {*kept.texts("text")} | {*held.texts("text")} == {*data.texts("text")}
    assert task.split(data, 0.1, 0)[1].texts("text") == held.texts("text")
    assert task.split(data, 0.1, 1)[1].texts("text") != held.texts("text")
    assert list(held.lines) == [int(text) + 2 for text in held.texts("text")]


def test_rows_of_other_tasks_are_split_by_chance() -> None:
    data = table(text=[str(i) for i in range(20)])
    kept, held = CausalLM.of(data, Columns()).split(data, 0.25, 3)
    assert (len(kept), len(held)) == (15, 5)
    assert {*kept.texts("text")}.isdisjoint(held.texts("text"))


def test_data_that_cannot_be_learnt_from_is_refused() -> None:
    one = table(text=["a", "b"], label=["x", "x"])
    with pytest.raises(InlayError, match=r"one label only\n.*2 rows labelled 'x'\n.*at least two labels"):
        Classification.of(one, Columns())
    lone = table(text=["a", "b"], label=["x", "y"])
    task = Classification.of(lone, Columns())
    with pytest.raises(
        InlayError, match=r"every label has a single row\n.*2 rows with 2 labels; --label label"
    ):
        task.split(lone, 0.5, 0)
    with pytest.raises(InlayError, match=r"one row cannot be split.*\n.*1 row in data\.csv\n.*--eval-data"):
        CausalLM(Columns()).split(table(text=["a"]), 0.1, 0)
    with pytest.raises(InlayError, match=r"no column 'target'\n"):
        Seq2Seq.of(table(text=["a"]), Columns())


def test_labels_that_training_does_not_have_are_refused() -> None:
    task = Classification.of(table(text=["a", "b"], label=["cat", "dog"]), Columns())
    other = table(text=["a", "b", "c"], label=["cat", "dgo", "dgo"])
    message = r"do not occur in training\n.*'dgo' in 2 rows; 'dgo' first in line 3 of data\.csv\n.*'dog'\?"
    with pytest.raises(InlayError, match=message):
        task.check_evaluated(other)


def test_classified_texts_are_cut_and_counted(tokenizer: Any) -> None:
    data = table(text=["good day", "bad " * 9], label=["x", "y"])
    examples = Classification.of(data, Columns()).encode(data, tokenizer, 6)
    assert examples.truncated == 1
    assert examples.lengths == [3, 6]
    assert examples[1]["input_ids"][-1] == tokenizer.eos_token_id  # cut before the end token, not through it
    assert [row["labels"] for row in examples] == [0, 1]


def test_pairs_of_texts_are_read_together(tokenizer: Any) -> None:
    data = table(text=["good", "bad"], other=["day", "day"], label=["x", "y"])
    examples = Classification.of(data, Columns(pair="other")).encode(data, tokenizer, 8)
    assert tokenizer.convert_ids_to_tokens(examples[0]["input_ids"]) == ["good", "[SEP]", "day"]


def test_a_text_alone_is_learnt_whole_with_its_end(decoder: Any) -> None:
    data = table(text=["good day", "bad " * 9])
    examples = CausalLM.of(data, Columns()).encode(data, decoder, 5)
    assert decoder.convert_ids_to_tokens(examples[0]["input_ids"]) == ["good", "day", "[SEP]"]
    assert examples[0]["labels"] == examples[0]["input_ids"]
    assert (examples.truncated, examples.lengths) == (1, [3, 5])


def test_after_a_prompt_only_the_target_is_learnt(decoder: Any) -> None:
    data = table(text=["it is so good", "he"], target=["a day", "was " * 9])
    examples = CausalLM.of(data, Columns(target="target")).encode(data, decoder, 6)
    tokens = [decoder.convert_ids_to_tokens(row["input_ids"]) for row in examples]
    assert tokens[0] == ["is", "so", "good", "a", "day", "[SEP]"]  # the prompt is cut at its start
    assert examples[0]["labels"][:3] == [-100] * 3
    assert examples[0]["labels"][3:] == examples[0]["input_ids"][3:]
    assert tokens[1] == ["he", *["was"] * 5]
    assert examples.truncated == 1


def test_what_is_written_is_padded_where_the_input_is(models: dict[str, Path]) -> None:
    tokenizer = loading.tokenizer(models["t5"])
    data = table(text=["it is good", "he"], target=["good", "so bad"])
    task = Seq2Seq.of(data, Columns())
    examples = task.encode(data, tokenizer, 8)
    batch = task.collator(tokenizer)(list(examples.rows))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].shape == (2, 3)
    assert batch["labels"][0].tolist()[-1] == -100
    assert examples.truncated == 0
    assert task.encode(data, tokenizer, 2).truncated == 2


def test_token_loss_weighs_every_token_the_same() -> None:
    """Against transformers' own shifted loss, over rows of different length."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = torch.randn(3, 6, 11), torch.randint(11, (3, 6))
    labels[0, 3:] = -100
    labels[2, :4] = -100
    reduced = [CausalLM(Columns()).reduce((logits[i : i + 1],), labels[i : i + 1]) for i in range(3)]
    found = CausalLM(Columns()).metrics(torch.cat(reduced).numpy(), np.zeros(0))
    wanted = float(ForCausalLMLoss(logits, labels, vocab_size=11))
    assert found["token_loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(wanted), rel=1e-5)


def test_the_written_text_is_not_shifted() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    found = Seq2Seq(Columns()).metrics(Seq2Seq(Columns()).reduce(logits, labels).numpy(), np.zeros(0))
    wanted = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    assert found["token_loss"] == pytest.approx(wanted, rel=1e-5)


def test_accuracy_counts_what_is_right() -> None:
    task = Classification(Columns(), ["x", "y"])
    reduced = task.reduce((torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]]),), None)
    assert task.metrics(reduced.numpy(), np.array([1, 1, 1])) == {"accuracy": pytest.approx(2 / 3)}
