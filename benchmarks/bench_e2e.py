"""E2E: from facts about a restaurant to a sentence, by a small decoder that this script pretrains itself.

Pretraining never sees facts: a Llama of 1.3 M parameters learns to say a sentence in another way, from half
the validation data. Stacks then learn to write sentences from the facts of the other half. Measured on facts
of the test data: perplexity of the sentences given there, and how many facts greedy decoding names.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from comparing import LORA, arguments, compare, write_rows
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from inlay_train.config import make
from inlay_train.predict import Predictor
from inlay_train.run import train

STACKS = (
    "full",
    LORA,
    "p_tuning_v2(length=16)",
    "serial_adapter(rank=24)",
    f"{LORA} + p_tuning_v2(length=16)",
)
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
VOCABULARY, SAID = 2000, 100
NAMED = ("name", "near", "Type", "food", "area", "price range", "customer rating")

Meanings = Mapping[str, Sequence[str]]


def meanings(file: Path) -> Meanings:
    """Return the sentences of each set of facts."""
    found: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        facts, _, sentence = line.partition("||")
        found.setdefault(facts.strip(), []).append(sentence.strip())
    return found


def blank(folder: Path, texts: Iterator[str]) -> Path:
    """Make a model folder with random weights and a tokenizer fitted to `texts`."""
    bytes_and_pairs = ByteLevelBPETokenizer()
    bytes_and_pairs.train_from_iterator(texts, VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=bytes_and_pairs._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **SIZES,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def pretrained(work: Path, known: Meanings) -> Path:
    """Return the folder of a decoder that says a sentence in another way; trained there once."""
    draw = random.Random(0)
    rows = []
    for sentences in known.values():
        for sentence in sentences:
            rows.append({"text": sentence, "target": draw.choice(sentences)})
    data = write_rows(work / "paraphrases.jsonl", rows)
    output = work / "pretrained"
    start = blank(work / "blank", (text for row in rows for text in row.values()))
    config = make(
        model=str(start), data=data, task="causal-lm", target="target", method="full", output=output, lr=3e-3,
        epochs=8, batch=32, by_length=True, best=False, keep=1,
    )  # fmt: skip
    result = train(config, resume=output.exists())
    print(
        f"pretrained: {result.base_parameters:,} parameters, perplexity {result.value:.2f} on held-out pairs"
    )
    return output


def pairs(known: Meanings) -> Iterator[dict[str, str]]:
    for facts, sentences in known.items():
        for sentence in sentences:
            yield {"text": f"{facts} :", "target": sentence}


def named(facts: str, said: str) -> tuple[int, int]:
    """Return how many of the facts that are said word for word occur in `said`, and how many there are."""
    values = dict(fact.split(" : ", 1) for fact in facts.split(" | "))
    wanted = [value.lower() for name, value in values.items() if name in NAMED]
    return sum(value in said.lower() for value in wanted), len(wanted)


def generated(work: Path, content: Mapping[str, Any], test: Meanings) -> dict[str, Any]:
    """Return, for each stack, the share of facts that its sentences name, and some of them."""
    facts = sorted(test)[:: max(1, len(test) // SAID)]
    file = write_rows(work / "facts.jsonl", ({"text": f"{fact} :", "target": ""} for fact in facts))
    found = {}
    for row in content["rows"]:
        said = [p["text"] for p in Predictor(work / "comparison" / "adapters" / row["runs"][0]).rows(file)]
        counts = [named(fact, text) for fact, text in zip(facts, said, strict=True)]
        share = sum(hit for hit, _ in counts) / sum(of for _, of in counts)
        found[row["stack"]] = {
            "facts_named": share,
            "examples": dict(list(zip(facts, said, strict=True))[::25]),
        }
        print(f"{row['stack']}: names {share:.1%} of the facts; such as: {said[0]}")
    return found


def main() -> None:
    given = arguments("e2e", __doc__ or "")
    valid, test = meanings(given.data / "valid.txt"), meanings(given.data / "test.txt")
    halves = [dict(list(valid.items())[start::2]) for start in (0, 1)]
    model = pretrained(given.work, halves[0])
    learn = write_rows(given.work / "learn.jsonl", pairs(halves[1]))
    held = write_rows(given.work / "test.jsonl", pairs(test))
    values = {
        "model": str(model), "data": learn, "test_data": held, "task": "causal-lm", "target": "target",
        "epochs": 3, "batch": 32, "by_length": True,
    }  # fmt: skip
    title = "E2E sentences: stacks on a small decoder compared"
    content = compare("e2e", given, values, STACKS, seeds=1, rates="1", title=title)
    file = RESULTS / "e2e.json"
    figures = {**json.loads(file.read_text()), "generation": generated(given.work, content, test)}
    file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
