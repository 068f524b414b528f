"""The demo: several stacks learn real text side by side; the best is loaded, merged and checked."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

import inlay
from inlay import InlayError
from inlay_train import data, demo_run, encoder, learning
from inlay_train.compare import charts, measure, page, table
from inlay_train.compare.engine import Comparison, Result, compare
from inlay_train.compare.progress import shown_on
from inlay_train.compare.store import Outcome, Store
from inlay_train.demo_run import NAME
from inlay_train.encoder import Encoded, accuracy, logits
from inlay_train.figures import peak_bytes

HEAD = "head"
LORA = 'lora(rank=8, alpha=16.0, targets=["linear"])'
PREFIX, ADAPTER = "p_tuning_v2(length=8)", "serial_adapter"
STACKS = (HEAD, LORA, PREFIX, ADAPTER, f"{LORA} + {ADAPTER}")
AGAIN = ("lora", "p_tuning_v2", ADAPTER, "trained")  # of the installed: compared already, or the head
RUNNER = "inlay_train.demo_run:run"
ROUNDING = 1e-3  # of the effect: how far float32 folding may move the logits


@dataclass(frozen=True)
class Recipe:
    """What was chosen on a part of the training texts held out for that, never on the test texts."""

    stacks: tuple[str, ...] = STACKS
    steps: int = 100
    batch: int = 16
    decay: float = 3e-4  # of the head alone
    most: int = data.MOST  # docstrings of a package
    seed: int = 0
    validation: bool = False  # measure on a quarter of the training texts instead of the test texts
    processes: int = field(default_factory=lambda: min(2, os.cpu_count() or 1))

    @property
    def threads(self) -> int:
        """Threads of each process: the cores, shared out."""
        return max(1, (os.cpu_count() or 1) // self.processes)


@dataclass
class Report:
    """The demo's figures: accuracies as shares of the held-out texts, seconds, and what was checked."""

    learnt_from: int
    held_out: int
    before: float
    head_only: float
    best: str = ""
    after: float = 0.0
    trained_parameters: int = 0
    seconds: float = 0.0
    loaded_bit_identical: bool = False
    merged_parts: tuple[str, ...] = ()
    merged_difference: float = 0.0


def every_stack() -> tuple[str, ...]:
    """Return the demo's stacks, LoRA beside a prefix, and every other installed method as it comes."""
    others = sorted(name for name, origin in inlay.methods().items() if origin.version and name not in AGAIN)
    return (*STACKS, f"{LORA} + {PREFIX}", *others)


def run(output: Path, recipe: Recipe | None = None, console: Console | None = None) -> Report:
    """Run the demo, tell its story on `console`, and leave its adapter and figures in `output`.

    Raises `InlayError` if the loaded or the merged model does not do what the trained one does.
    """
    recipe, console = recipe or Recipe(), console or Console(highlight=False, soft_wrap=True)
    start = time.monotonic()
    make_folder(output)
    learn, held = texts(recipe, console)
    report, comparison = baseline(output, learn, held, recipe, console)
    result = compare_stacks(output, comparison, recipe, console)
    best = next(row for row in table.ranked(result.rows) if row.stack != HEAD)
    report.best, report.after, report.trained_parameters = best.stack, best.mean, best.parameters
    console.print(f"\nOn with the best of them, {best.stack}", markup=False)
    saved = Store(output / "runs").adapter(comparison.job(best.stack, recipe.seed, 1.0))
    shutil.copytree(saved, output / "adapter")
    with threads(recipe.threads):
        trained = demo_run.saved_logits(saved)
        fresh = load_into_fresh(output / "adapter", recipe, held, trained, report, console)
        merge_and_check(fresh, held, trained, report, console)
    report.seconds = round(time.monotonic() - start, 1)
    content = {"recipe": asdict(recipe), "report": asdict(report), **table.data(result)}
    (output / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    tell_where(output, report, console)
    return report


def make_folder(output: Path) -> None:
    """Make the output folder before anything takes time, without what an earlier demo left there."""
    if output.exists() and not output.is_dir():
        raise InlayError("the output is not a folder", saw=f"{output}", do="choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    for made in ("runs", "adapter"):
        shutil.rmtree(output / made, ignore_errors=True)


def texts(recipe: Recipe, console: Console) -> tuple[Encoded, Encoded]:
    """Return the docstrings to learn from and those held out, as tokens; show one of them."""
    learn, held = demo_run.samples(recipe.most, recipe.validation)
    console.rule("Which package of Python's standard library does a docstring come from?")
    console.print(
        f"{len(learn)} docstrings to learn from, {len(held)} held out, of {', '.join(data.PACKAGES)}"
    )
    shortest = min(range(len(held)), key=lambda i: len(held.texts[i]))
    package = data.PACKAGES[held.labels[shortest]]
    console.print(f"such as: {held.texts[shortest]!r} → {package}", markup=False)
    return encoder.encode(learn), encoder.encode(held)


def baseline(
    output: Path, learn: Encoded, held: Encoded, recipe: Recipe, console: Console
) -> tuple[Report, Comparison]:
    """Measure the model with its new head, and with the head fitted to its features, computed once.

    The fitted head is kept in a file: every stack starts where a head alone ends (arXiv 2202.10054).
    """
    model, start = encoder.load(recipe.seed), time.perf_counter()
    size = sum(p.numel() for p in model.parameters())
    console.print(
        f"model: {encoder.PACKAGE}, {size / 1e6:.1f} M parameters; reading the texts with it, frozen …"
    )

    def features(**batch: Tensor) -> Tensor:
        return model.base_model(**batch).pooler_output  # type: ignore[operator]

    known, new = learn.through(features), held.through(features)
    head = learning.head_only(known, learn.labels, len(data.PACKAGES), recipe.decay)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        before, alone = accuracy(model.classifier(new), held), accuracy(head(new), held)  # type: ignore[operator]
    console.print(f"right before anything is learnt: {before:.1%}; with the head alone fitted: {alone:.1%}")
    store = Store(output / "runs")
    file = output / "runs" / "head.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, file)
    settings = {
        "most": recipe.most, "validation": recipe.validation, "steps": recipe.steps, "batch": recipe.batch,
        "decay": recipe.decay, "head": alone,
    }  # fmt: skip
    stacks = {stack: stack for stack in recipe.stacks}
    comparison = Comparison(
        stacks,
        RUNNER,
        settings,
        seeds=1,
        rates=(1.0,),
        paths={"head": str(file.absolute())},
        without_rate=(HEAD,),
    )
    parameters = sum(p.numel() for p in head.parameters())
    store.put(comparison.job(HEAD, 0, 1.0), Outcome(
        metric="accuracy", value=alone, higher_is_better=True, parameters=parameters, base_parameters=size,
        file_bytes=file.stat().st_size, step_seconds=0.0, seconds=seconds, peak_bytes=peak_bytes(),
        merges="yes", steps=0,
    ))  # fmt: skip
    return Report(len(learn), len(held), before=before, head_only=alone), comparison


def compare_stacks(output: Path, comparison: Comparison, recipe: Recipe, console: Console) -> Result:
    """Train every stack, each in a process of its own, and show how they compare."""
    console.print(
        f'\nEach stack: inlay.attach(model, stack, train=("head",)), then {recipe.steps} steps of '
        f"{recipe.batch} texts on from the fitted head, every part at its method's own rate",
        markup=False,
    )
    with shown_on(console) as (done, phase):
        result = compare(
            comparison, output / "runs", processes=recipe.processes, threads=recipe.threads,
            done=done, phase=phase,
        )  # fmt: skip
    title = "Which package? Stacks compared on Python's docstrings"
    machine = table.machine(recipe.threads, recipe.processes)
    console.print(table.terminal(result, title))
    pictures = charts.draw(table.ranked(result.rows), machine)
    charts.save(pictures, output)
    about = (
        f"{encoder.PACKAGE}, seed {recipe.seed}: {recipe.steps} steps of {recipe.batch} texts for each "
        f'stack, on from the head fitted alone to the frozen model, which is "{HEAD}".'
    )
    page.save(page.page(result, pictures, title=title, about=about, machine=machine), output)
    return result


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` threads, as the runs did: another number rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    left = ", ".join(p.path for p in inlay.summary(model).parts) or "nothing"
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
    size = table.size(measure.file_bytes(folder))
    console.rule(f"done in {report.seconds:.0f} s")
    console.print(f"{folder}  the best stack, {size}: inlay.load(model, {str(folder)!r})")
    console.print(
        f"{output / 'comparison.html'}  the comparison, to look at in a browser; its pictures beside it"
    )
    console.print(f"{output / 'report.json'}  all figures")
