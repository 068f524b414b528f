"""Tiny real models with real tokenizers in folders, tables of text, and the command as a process."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay_train import base, loading
from inlay_train.table import Table
from inlay_train.tasks import CausalLM, Columns

WORDS = {"good": ["bright", "calm", "fine", "glad", "kind", "nice", "warm", "wise"],
         "bad": ["bleak", "cold", "dull", "grim", "mean", "rude", "sad", "weak"]}  # fmt: skip
COMMON = [
    "a",
    "and",
    "day",
    "he",
    "is",
    "it",
    "it's",
    "one",
    "she",
    "so",
    "that",
    "the",
    "this",
    "was",
    "we",
    "were",
]
TEXTS = ["it is a good day", "so he was bad and she was good", "the day was we", "she is so"] * 4
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return (text, label): a few words of the label's among common ones."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        label = ("good", "bad")[i % 2]
        words = [*draw.sample(WORDS[label], 3), *draw.sample(COMMON, draw.randint(3, 8))]
        draw.shuffle(words)
        found.append((" ".join(words), label))
    return found


def save_tokenizer(folder: Path, *, ends: bool) -> int:
    """Write a word tokenizer; `ends` puts an end token after every text. Return its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {w: i for i, w in enumerate([*special, *WORDS, *COMMON, *WORDS["good"], *WORDS["bad"]])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "$A [SEP]" if ends else "$A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair="$A [SEP] $B:1", special_tokens=[("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        eos_token="[SEP]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    return len(words)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny encoder, decoder and encoder-decoder, with weights drawn from a seed."""
    import transformers

    base.quiet()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {
        "bert": (transformers.BertConfig, transformers.BertModel, {**sizes, "max_position_embeddings": 64}),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM,
                  {**sizes, "max_position_embeddings": 64, "eos_token_id": 3, "bos_token_id": None}),
        "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration,
               {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "eos_token_id": 3,
                "decoder_start_token_id": 0}),
    }  # fmt: skip
    folders = {}
    for name, (config, kind, settings) in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        size = save_tokenizer(folders[name], ends=name != "llama")
        torch.manual_seed(0)
        kind(config(vocab_size=size, pad_token_id=0, **settings)).save_pretrained(folders[name])
    return folders


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows under column names to a csv file."""

    def write(rows: Any = None, names: tuple[str, ...] = ("text", "label"), file: str = "data.csv") -> Path:
        path = tmp_path / file
        with path.open("w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([names, *(sentences(60) if rows is None else rows)])
        return path

    return write


@pytest.fixture
def inlay_command() -> Command:
    """Return a function that runs `inlay` in a process of its own, to its end."""

    def run(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "inlay_train", *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def llama(models: dict[str, Path]) -> Callable[[], Any]:
    """Return a function that loads the tiny decoder."""
    from transformers import LlamaForCausalLM

    return lambda: loading.model(models["llama"], LlamaForCausalLM, seed=0, settings={"pad_token_id": 0})


@pytest.fixture
def made(models: dict[str, Path], llama: Callable[[], Any], tmp_path: Path) -> Callable[..., Any]:
    """Return a function that makes a Trainer of the tiny decoder with a stack, or of a model given."""
    from transformers import TrainingArguments

    from inlay_train.trainer import Trainer

    base.quiet()
    tokenizer, task = loading.tokenizer(models["llama"]), CausalLM(Columns())
    rows = task.encode(Table(Path("d.csv"), {"text": TEXTS}, range(len(TEXTS))), tokenizer, 16)

    ours = ("lr", "rate", "masters", "adapter", "callbacks", "optimizers")

    def make(
        stack: Any = "lora(rank=2)", *, model: Any = None, name: str = "fr", output: str = "out", **more: Any
    ) -> Trainer:
        own = {k: more.pop(k) for k in ours if k in more}
        args = TrainingArguments(**{
            "output_dir": str(tmp_path / output), "max_steps": 6, "per_device_train_batch_size": 4,
            "save_steps": 3, "eval_steps": 3, "eval_strategy": "steps", "logging_steps": 1,
            "report_to": "none", "disable_tqdm": True, "use_cpu": True, **more,
        })  # fmt: skip
        model = llama() if model is None else model
        if stack is not None:
            inlay.attach(model, stack, name, seed=0)
        return Trainer(
            model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
            data_collator=task.collator(tokenizer), **own,
        )  # fmt: skip

    return make
