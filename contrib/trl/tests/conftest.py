"""A tiny decoder, a word tokenizer with a chat template, and rows of text for each of TRL's trainers."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # TRL would tell its makers of every Trainer built

QUESTIONS = ["what is red ?", "what is green ?", "what is cold ?", "what is warm ?"]
ANSWERS = ["a rose is red .", "a leaf is green .", "the snow is so cold .", "the sun is warm ."]
WORDS = sorted({word for text in [*QUESTIONS, *ANSWERS] for word in text.split()} | {"user", "assistant"})
SPECIAL = ["<pad>", "<unk>", "<end>"]
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['role'] }} {% generation %}"
    "{{ m['content'] }} <end> {% endgeneration %}{% else %}{{ m['role'] }} {{ m['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def word_tokenizer(special: list[str], template: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token=special[2],
        model_max_length=64,
    )  # fmt: skip
    made.chat_template = template
    return made


@pytest.fixture(scope="session")
def trl() -> Any:
    """TRL, imported where a test runs and not where it is collected: that takes seconds."""
    return pytest.importorskip("trl", reason="TRL is not installed")


@pytest.fixture(scope="session")
def inlay_trl(trl: Any) -> Any:
    return import_module("inlay_trl")


@pytest.fixture
def tokenizer() -> Any:
    return word_tokenizer(SPECIAL, MARKED)


@pytest.fixture
def decoder() -> Callable[..., Any]:
    """Return a function that makes the decoder, always with the same weights."""
    import transformers

    def make(kind: str = "LlamaForCausalLM", **changes: Any) -> Any:
        config = transformers.LlamaConfig(**{
            "vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
            "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None,
            "initializer_range": 0.2, **changes,
        })  # fmt: skip
        torch.manual_seed(0)
        return getattr(transformers, kind)(config)

    return make


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that gives the arguments all of TRL's configurations share."""

    def make(output: str = "out", **changes: Any) -> dict[str, Any]:
        return {
            "output_dir": str(tmp_path / output), "max_steps": 4, "per_device_train_batch_size": 2,
            "save_steps": 2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
            "use_cpu": True, "bf16": False, "max_length": 24, **changes,
        }  # fmt: skip

    return make


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def chats() -> Any:
    """Conversations of one question and its answer."""
    from datasets import Dataset

    return Dataset.from_list(
        [{"messages": turns(*each)} for each in zip(QUESTIONS, ANSWERS, strict=True)] * 2
    )


@pytest.fixture
def pairs() -> Any:
    """Conversations, the answer preferred to its words in another order."""
    from datasets import Dataset

    others = [" ".join(reversed(answer.split())) for answer in ANSWERS]
    both = zip(QUESTIONS, ANSWERS, others, strict=True)
    return Dataset.from_list([{"chosen": turns(q, a), "rejected": turns(q, b)} for q, a, b in both] * 2)


@pytest.fixture
def other_tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer whose chat template needs two tokens that the decoder's has not."""
    folder = tmp_path / "other"
    made = word_tokenizer([*SPECIAL[:2], "<|im_end|>"], MARKED.replace("<end>", "<|im_end|>"))
    made.add_tokens(["<|im_start|>"])
    made.save_pretrained(folder)
    return folder
