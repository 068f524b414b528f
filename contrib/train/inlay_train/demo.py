"""The demo: a stack of LoRA and prefix tuning learns real text, is saved, loaded, merged and checked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import inlay
from inlay import InlayError
from inlay_train import data, encoder, learning
from inlay_train.encoder import Encoded, accuracy, logits

NAME = "docstrings"
STACK = 'lora(rank=8, alpha=16.0, targets=["linear"]) + p_tuning_v2(length=8)'
ROUNDING = 1e-3  # of the effect: how far float32 folding may move the logits


@dataclass(frozen=True)
class Recipe:
    """What was chosen on a part of the training texts held out for that, never on the test texts."""

    stack: str = STACK
    epochs: int = 5
    batch: int = 16
    decay: float = 3e-4  # of the head alone
    most: int = data.MOST  # docstrings of a package
    seed: int = 0
    validation: bool = False  # measure on a quarter of the training texts instead of the test texts


@dataclass
class Report:
    """The demo's figures: accuracies as shares of the held-out texts, seconds, and what was checked."""

    learnt_from: int
    held_out: int
    before: float
    head_only: float
    after: float = 0.0
    trained_parameters: int = 0
    seconds: float = 0.0
    loaded_bit_identical: bool = False
    merged_parts: tuple[str, ...] = ()
    merged_difference: float = 0.0


def run(output: Path, recipe: Recipe | None = None, console: Console | None = None) -> Report:
    """Run the demo, tell its story on `console`, and leave its adapter and figures in `output`.

    Raises `InlayError` if the loaded or the merged model does not do what the trained one does.
    """
    recipe, console = recipe or Recipe(), console or Console(highlight=False, soft_wrap=True)
    start = time.monotonic()
    make_folder(output)
    learn, held = texts(recipe, console)
    model = encoder.load(recipe.seed)
    report = baseline(model, learn, held, recipe, console)
    attach_and_train(model, learn, recipe, console)
    trained = logits(model, held)
    report.after = accuracy(trained, held)
    report.trained_parameters = inlay.summary(model).trainable
    console.print(accuracies(report))
    inlay.save(model, output / "adapter", overwrite=True)
    fresh = load_into_fresh(output / "adapter", recipe, held, trained, report, console)
    merge_and_check(fresh, held, trained, report, console)
    report.seconds = round(time.monotonic() - start, 1)
    content = {"recipe": asdict(recipe), "report": asdict(report)}
    (output / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    tell_where(output, report, console)
    return report


def make_folder(output: Path) -> None:
    """Make the output folder before anything takes time."""
    if output.exists() and not output.is_dir():
        raise InlayError("the output is not a folder", saw=f"{output}", do="choose another --output")
    output.mkdir(parents=True, exist_ok=True)


def texts(recipe: Recipe, console: Console) -> tuple[Encoded, Encoded]:
    """Return the docstrings to learn from and those held out, as tokens; show one of them."""
    learn, held = data.split(data.docstrings(recipe.most))
    if recipe.validation:
        learn, held = data.split(learn)
    console.rule("Which package of Python's standard library does a docstring come from?")
    console.print(
        f"{len(learn)} docstrings to learn from, {len(held)} held out, of {', '.join(data.PACKAGES)}"
    )
    shortest = min(range(len(held)), key=lambda i: len(held.texts[i]))
    package = data.PACKAGES[held.labels[shortest]]
    console.print(f"such as: {held.texts[shortest]!r} → {package}", markup=False)
    return encoder.encode(learn), encoder.encode(held)


def baseline(model: nn.Module, learn: Encoded, held: Encoded, recipe: Recipe, console: Console) -> Report:
    """Measure the model with its new head, and with the head fitted to its features, computed once.

    The fitted head stays: the stack starts where a head alone ends (arXiv 2202.10054).
    """
    size = sum(p.numel() for p in model.parameters())
    console.print(
        f"model: {encoder.PACKAGE}, {size / 1e6:.1f} M parameters; reading the texts with it, frozen …"
    )

    def features(**batch: Tensor) -> Tensor:
        return model.base_model(**batch).pooler_output  # type: ignore[operator]

    known, new = learn.through(features), held.through(features)
    head = learning.head_only(known, learn.labels, len(data.PACKAGES), recipe.decay)
    with torch.no_grad():
        before, alone = accuracy(model.classifier(new), held), accuracy(head(new), held)  # type: ignore[operator]
    model.classifier.load_state_dict(head.state_dict())  # type: ignore[union-attr]
    return Report(len(learn), len(held), before=before, head_only=alone)


def attach_and_train(model: nn.Module, learn: Encoded, recipe: Recipe, console: Console) -> None:
    """Attach the stack with a trained head and let it learn, with a progress bar."""
    console.print(f'\ninlay.attach(model, {recipe.stack!r}, train=("head",))', markup=False)
    plan = inlay.attach(model, recipe.stack, NAME, train=("head",), seed=recipe.seed)
    console.print(str(plan), markup=False)
    with progress(recipe.epochs * learning.steps_per_epoch(learn, recipe.batch), console) as step:
        learning.train(model, learn, epochs=recipe.epochs, batch=recipe.batch, seed=recipe.seed, step=step)


@contextmanager
def progress(total: int, console: Console) -> Iterator[Any]:
    """Show a bar of `total` steps; yields the function to call with each step's loss."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=total, loss="")
        yield lambda loss: bar.update(task, advance=1, loss=f"loss {loss:.3f}")


def accuracies(report: Report) -> Table:
    """Return the table of what was right before and after, beside the head alone."""
    table = Table("", "right", title=f"Accuracy on {report.held_out} held-out docstrings")
    table.add_row("before: the model, its head new", f"{report.before:.1%}")
    table.add_row("head only: the frozen model, its head fitted", f"{report.head_only:.1%}")
    table.add_row("after: the stack, on from that head", f"{report.after:.1%}", style="bold")
    return table


def load_into_fresh(
    folder: Path, recipe: Recipe, held: Encoded, trained: Tensor, report: Report, console: Console
) -> nn.Module:
    """Load the saved adapter into a new model with another head; its logits must be the very same."""
    fresh = encoder.load(recipe.seed + 1)
    count = inlay.load(fresh, folder, NAME)
    loaded = logits(fresh, held)
    report.loaded_bit_identical = torch.equal(loaded, trained)
    same = same_predictions(loaded, trained)
    if not report.loaded_bit_identical:
        raise different("the loaded model", same, loaded, trained)
    console.print(f"saved and loaded into a fresh model: {count} tensors; {same}, logits equal bit for bit")
    return fresh


def merge_and_check(
    model: nn.Module, held: Encoded, trained: Tensor, report: Report, console: Console
) -> None:
    """Fold what has a weight form into the base's weights; the model must do the same as before."""
    parts = inlay.summary(model).parts
    report.merged_parts = tuple(p.path for p in parts if p.mergeable)
    console.print(str(inlay.merge(model, parts=report.merged_parts, undo=False)))
    merged = logits(model, held)
    report.merged_difference = float((merged - trained).norm() / trained.norm())
    same = same_predictions(merged, trained)
    if report.merged_difference > ROUNDING:
        raise different("the merged model", same, merged, trained)
    left = ", ".join(p.path for p in inlay.summary(model).parts)
    console.print(f"merged: {same}, logits differ by {report.merged_difference:.0e}; still attached: {left}")


def same_predictions(now: Tensor, then: Tensor) -> str:
    return f"{int((now.argmax(1) == then.argmax(1)).sum())} of {len(now)} predictions identical"


def different(which: str, same: str, now: Tensor, then: Tensor) -> InlayError:
    return InlayError(
        f"{which} does not do what the trained one does",
        saw=f"{same}; logits differ by up to {float((now - then).abs().max()):.1e}",
        do="report this with your versions of torch, transformers and inlay",
    )


def tell_where(output: Path, report: Report, console: Console) -> None:
    """Say what is where, and how to use it."""
    folder = output / "adapter"
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
    console.rule(f"done in {report.seconds:.0f} s")
    console.print(f"{folder}  the adapter, {size:.1f} MB: inlay.load(model, {str(folder)!r})")
    console.print(f"{output / 'report.json'}  these figures")
