"""One stack of the demo: trained from the fitted head on, measured, saved. Runs in a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay_train import data, encoder, learning
from inlay_train.adapted import reaches_heads
from inlay_train.compare import measure
from inlay_train.compare.store import Job, Outcome
from inlay_train.encoder import Encoded, accuracy, logits
from inlay_train.figures import peak_bytes

NAME = "docstrings"


def run(job: Job, folder: Path) -> Outcome:
    """Train `job.stack` on the docstrings, save it in `folder`, and return what was measured."""
    learn, held = texts(job.settings["most"], job.settings["validation"])
    model = encoder.load(job.seed)
    model.classifier.load_state_dict(load_file(job.paths["head"]))  # type: ignore[union-attr]
    base = sum(p.numel() for p in model.parameters())
    steps, batch = job.settings["steps"], job.settings["batch"]
    inlay.attach(
        model, job.stack, NAME, train=beside(model, job.stack), seed=job.seed,
        data=labelled(learn, batch, job.seed),
    )  # fmt: skip
    losses, took, start = [], [], time.perf_counter()
    lap = start

    def step(loss: float) -> None:
        nonlocal lap
        now = time.perf_counter()
        losses.append((float(len(losses) + 1), loss))
        took.append(now - lap)
        lap = now

    learning.train(model, learn, steps=steps, batch=batch, seed=job.seed, rate=job.rate, step=step)
    seconds = time.perf_counter() - start
    outputs = logits(model, held)
    right = accuracy(outputs, held)
    inlay.save(model, folder, overwrite=True)
    save_file({"logits": outputs}, logits_file(folder))
    return Outcome(
        metric="accuracy", value=right, higher_is_better=True, parameters=inlay.summary(model).trainable,
        base_parameters=base, file_bytes=measure.file_bytes(folder), step_seconds=statistics.median(took),
        seconds=seconds, peak_bytes=peak_bytes(), merges=merges(model), steps=steps,
        losses=losses, values=[(0.0, job.settings["head"]), (float(steps), right)],
    )  # fmt: skip


def beside(model: nn.Module, stack: str) -> tuple[str, ...]:
    """Return what learns beside the stack: the head, unless the stack reaches it by itself."""
    return () if reaches_heads(model, stack) else ("head",)


def labelled(texts: Encoded, batch: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the texts once in batches with their labels, for methods that see data before they are placed."""
    for indices in texts.epoch(batch, torch.Generator().manual_seed(seed)):
        yield {**texts.batch(indices), "labels": texts.labels[indices]}


def merges(model: nn.Module) -> str:
    parts = [(p.path.partition("/")[2], p.mergeable) for p in inlay.summary(model).parts]
    return measure.merges([name for name, _ in parts], [name for name, folds in parts if folds])


def texts(most: int, validation: bool) -> tuple[Encoded, Encoded]:
    """Return the docstrings to learn from and those held out, as tokens."""
    learn, held = samples(most, validation)
    return encoder.encode(learn), encoder.encode(held)


def samples(most: int, validation: bool) -> tuple[data.Samples, data.Samples]:
    """Return the docstrings to learn from and those held out; for `validation`, from the former alone."""
    learn, held = data.split(data.docstrings(most))
    return data.split(learn) if validation else (learn, held)


def logits_file(folder: Path) -> Path:
    """Return where the logits (N, classes) of the trained model on the held-out texts are kept."""
    return folder.with_name(f"{folder.name}.logits.safetensors")


def saved_logits(folder: Path) -> torch.Tensor:
    return load_file(logits_file(folder))["logits"]
