"""A run from its configuration to its figures: load, attach, train, measure, save."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalPrediction

import inlay
from inlay import InlayError
from inlay.distributed import check_same
from inlay.stack import need_state
from inlay_train import figures, loading, processes, resumable
from inlay_train.config import RunConfig
from inlay_train.figures import Result
from inlay_train.folder import FREE, RESULT, TASK, Folder, record, write
from inlay_train.precision import adapter_dtype
from inlay_train.prepare import Prepared, longest, prepare
from inlay_train.quantised import prepare_quantised
from inlay_train.tasks import Examples
from inlay_train.trainer import Trainer
from inlay_train.watch import Watch

ADAPTER = "default"
FULL_RATE = 5e-5  # of training everything
POINTS = 500  # of the learning curve, at most
# What transformers calls them.
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit",
              "paged_adamw_8bit": "paged_adamw_8bit"}  # fmt: skip


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
    prepared: Prepared | None = None,
) -> Result:
    """Carry out a run and return its figures, which its output folder holds too.

    With `resume`, go on from the last checkpoint in the folder; a run that is finished is only read.
    Raises `InlayError` for whatever is wrong, before a weight is loaded where that can be known, and
    `Stopped` when asked to stop (Ctrl-C). Every process of several calls it; the first one writes.
    """
    console = console or Console(quiet=True)
    prepared = prepared or prepare(config)
    processes.agree(facts(prepared))
    folder = Folder(config.output.resolve())
    with processes.of_main(folder.claimed):
        resuming = processes.together(lambda: folder.holds(prepared, resume=resume))
        if resuming and (done := finished(folder)):
            console.print("this run is finished already")
            return done
        return Run(prepared, folder, console).train(resuming)


def finished(folder: Folder) -> Result | None:
    """Return the figures of a finished run, or None."""
    file = folder.path / RESULT
    if not file.is_file():
        return None
    known = {field.name for field in dataclasses.fields(Result)}
    return Result(**{name: value for name, value in json.loads(file.read_bytes()).items() if name in known})


class Run:
    """A run at work."""

    def __init__(self, prepared: Prepared, folder: Folder, console: Console) -> None:
        self.prepared, self.config, self.task = prepared, prepared.config, prepared.task
        self.folder, self.console = folder, console
        self.tokenizer = loading.tokenizer(prepared.folder)
        self.longest = longest(self.config, prepared.model_config, self.tokenizer)
        self.learn, self.held = self._encoded(prepared.learn), self._encoded(prepared.held)
        self.truncated = self._tell_truncated()
        self.watch = Watch(console, self.task.metric)

    def train(self, resuming: bool) -> Result:
        """Train to the end and leave the results in the folder."""
        model = self._model()
        self._attach(model)
        self._try_longest(model)
        trainer = self._trainer(model)
        self._tell(model)
        checkpoint = processes.gathered(trainer.last_checkpoint() if resuming else None)[0]
        if not resuming and processes.is_main():
            self.folder.begin(self.prepared)
        if resuming:
            self.console.print(
                f"resuming from {checkpoint.name}" if checkpoint else "no checkpoint yet: from the start"
            )
        with processes.noticing(lambda: self._how_to_go_on(trainer)):
            with self.watch.watching():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            result = self._measure(trainer)
            processes.together(lambda: self._leave(trainer, result))
        return result

    def _how_to_go_on(self, trainer: Trainer) -> str:
        last = trainer.last_checkpoint()
        return (
            f"see above why it ended; then start all again with --output {self.config.output} --resume: "
            + (f"{last.name} is whole" if last else "there is no checkpoint yet, so from the start")
        )

    # -- data ----------------------------------------------------------------------------------------

    def _encoded(self, table: Any) -> Examples:
        return self.task.encode(table, self.tokenizer, self.longest)

    def _tell_truncated(self) -> float:
        count, cut = len(self.learn) + len(self.held), self.learn.truncated + self.held.truncated
        if cut:
            self.console.print(
                f"{cut:,} of {count:,} texts ({cut / count:.1%}) are cut: longer than {self.longest} tokens"
            )
        return cut / count

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield the rows to learn from in batches, once, for methods that calibrate."""
        collate = self.task.collator(self.tokenizer)
        for start in range(0, len(self.learn), self.config.batch):
            yield dict(collate(self.learn.rows[start : start + self.config.batch]))

    # -- model ---------------------------------------------------------------------------------------

    def _model(self) -> nn.Module:
        prepared, config = self.prepared, self.config
        model = loading.model(
            prepared.folder, prepared.kind, seed=config.seed, settings=self.task.config(self.tokenizer),
            dtype=config.dtype, few_bits=config.few_bits, heads=prepared.heads,
        )  # fmt: skip
        if config.few_bits is not None:
            self.console.print(str(prepare_quantised(model, checkpointing=config.gradient_checkpointing)))
        return model

    def _attach(self, model: nn.Module) -> None:
        if self.prepared.stack is not None:
            with torch.random.fork_rng(devices=[]):
                inlay.attach(
                    model, self.prepared.stack, ADAPTER, seed=self.config.seed, data=self._batches(),
                    dtype=adapter_dtype(self.config),
                )  # fmt: skip
            processes.together(lambda: check_same(model))

    def _try_longest(self, model: Any) -> None:
        """Run the longest text once where virtual tokens take positions too: errors come before training."""
        placed = need_state(model).placed.values() if self.prepared.stack is not None else ()
        if not any(site.kind == "sequence" for p in placed for site in p.adapter.sites):
            return
        examples = max((self.learn, self.held), key=lambda found: max(found.lengths))
        row = examples[max(range(len(examples)), key=examples.lengths.__getitem__)]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model.train()(**self.task.collator(self.tokenizer)([row]).to(model.device))

    def _tell(self, model: nn.Module) -> None:
        self.console.print(
            f"{len(self.learn):,} rows to learn from, {len(self.held):,} to evaluate on; "
            f"{parameters(model):,} parameters learn"
        )

    # -- training ------------------------------------------------------------------------------------

    def _trainer(self, model: nn.Module) -> Trainer:
        adapted = self.prepared.stack is not None
        trainer = Trainer(
            model, self._arguments(), adapter=ADAPTER if adapted else None,
            lr=self.config.lr, rate=self.config.rate, masters=self.config.master_weights,
            train_dataset=self.learn, eval_dataset=self.held, processing_class=self.tokenizer,
            data_collator=self.task.collator(self.tokenizer), callbacks=[self.watch],
            compute_metrics=self._metrics, preprocess_logits_for_metrics=self.task.reduce,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _arguments(self) -> TrainingArguments:
        config = self.config
        batches = math.ceil(len(self.learn) / (config.batch * processes.count()))
        per_epoch = math.ceil(batches / config.accumulate)
        total = config.steps or math.ceil(config.epochs * per_epoch)
        every = min(config.evaluate_every or per_epoch, total)
        return TrainingArguments(
            output_dir=str(self.folder.path), seed=config.seed, data_seed=config.seed,
            max_steps=total, per_device_train_batch_size=config.batch,
            train_sampling_strategy="group_by_length" if config.by_length else "random",
            gradient_accumulation_steps=config.accumulate, per_device_eval_batch_size=config.eval_batch,
            learning_rate=(config.lr or FULL_RATE) * config.rate, weight_decay=config.weight_decay,
            lr_scheduler_type=config.schedule, warmup_steps=config.warmup, max_grad_norm=config.max_norm,
            eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=every,
            save_total_limit=config.keep, load_best_model_at_end=config.best,
            metric_for_best_model=self.task.metric, greater_is_better=self.task.higher_is_better,
            logging_steps=max(1, math.ceil(total / POINTS)), logging_nan_inf_filter=False,
            activation_checkpointing=config.gradient_checkpointing, optim=OPTIMIZERS[config.optimizer],
            report_to="none", disable_tqdm=True,
            bf16=config.mixed_precision == "bf16", fp16=config.mixed_precision == "fp16",
            dataloader_pin_memory=torch.cuda.is_available(), label_names=["labels"],
            use_cpu=processes.on_cpu() or not torch.accelerator.is_available(),
            ddp_find_unused_parameters=None if self.prepared.stack is None else False,  # core reaches them
        )  # fmt: skip

    def _metrics(self, found: EvalPrediction) -> dict[str, float]:
        return self.task.metrics(found.predictions, found.label_ids)

    # -- results -------------------------------------------------------------------------------------

    def _measure(self, trainer: Trainer) -> Result:
        model, state = trainer.model, trainer.state
        evaluations = figures.evaluations(state.log_history)
        ended = state.best_global_step if self.config.best and state.best_global_step else state.global_step
        values = next(dict(e) for e in reversed(evaluations) if e["step"] == ended)
        values.pop("step")
        test = {}
        if self.prepared.test is not None:
            found = trainer.evaluate(self._encoded(self.prepared.test), metric_key_prefix="test")  # type: ignore[arg-type]
            test = figures.metrics(found, "test")
        summary = inlay.summary(model)
        return Result(
            task=self.task.name, method=self.config.method, metric=self.task.metric,
            higher_is_better=self.task.higher_is_better,
            value=values[self.task.metric], metrics=values, test=test,
            parameters=parameters(model), base_parameters=summary.base_parameters,
            steps=state.global_step, best_step=ended,
            seconds=self.watch.seconds, step_seconds=self.watch.step_seconds, peak_bytes=figures.peak_bytes(),
            file_bytes=0, learnt_from=len(self.learn), evaluated_on=len(self.held), truncated=self.truncated,
            mergeable=[p.path.partition("/")[2] for p in summary.parts if p.mergeable],
            output=str(self.config.output), labels=list(self.task.labels),
            losses=figures.losses(state.log_history), evaluations=evaluations,
        )  # fmt: skip

    def _leave(self, trainer: Trainer, result: Result) -> None:
        """Leave the results in the folder, or say why they cannot be written."""
        try:
            trainer.save_model()
            if processes.is_main():
                self._write(trainer, result)
        except (OSError, InlayError) as error:
            if not (reason := resumable.not_written(error)):
                raise
            raise resumable.cannot_write(self.folder.path, reason, trainer.last_checkpoint()) from error

    def _write(self, trainer: Trainer, result: Result) -> None:
        """Leave card, picture and figures beside the adapter; the figures last: then it is finished."""
        path = self.folder.path
        trainer.create_model_card(tasks=self.task.name)
        result.file_bytes = sum(f.stat().st_size for f in path.glob("*.safetensors"))
        write(path / TASK, json.dumps(self._facts(), indent=1))
        figures.draw(result, path / "curve.png")
        write(path / RESULT, json.dumps(result.plain, indent=1))

    def _facts(self) -> dict[str, Any]:
        """Return what a prediction must know beside the adapter."""
        config = self.config
        folder = Path(config.model)
        return {
            **self.task.facts, "base": str(folder.resolve()) if folder.is_dir() else config.model,
            "adapter": self.prepared.stack is not None, "max_length": self.longest, "seed": config.seed,
            "dtype": config.dtype, "few_bits": config.few_bits and dataclasses.asdict(config.few_bits),
        }  # fmt: skip


def facts(prepared: Prepared) -> dict[str, str]:
    """Return what decides a run's weights, in words by name, the packages of its methods too."""
    if processes.count() == 1:
        return {}
    found = record(prepared)
    settings = {name: str(value) for name, value in found["config"].items() if name not in FREE}
    digests = {f"{name.replace('_', '-')}, its digest": str(d) for name, d in found["digests"].items()}
    here = inlay.methods()
    origins = {part["method"]: here[part["method"]] for part in prepared.parts}
    packages = {f"the package of {name!r}": f"{o.distribution} {o.version}" for name, o in origins.items()}
    stack = {f"part {part['name']!r}": str(part["settings"]) for part in prepared.parts}
    return {**packages, **stack, **settings, "model, its digest": found["base"], **digests}


def parameters(model: nn.Module) -> int:
    """Return how many parameters learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def told(result: Result) -> Sequence[str]:
    """Return the figures in words, a line each."""
    lines = [f"{result.metric} {result.value:.4g} on {result.evaluated_on:,} rows held out"]
    if result.test:
        lines.append(f"{result.metric} {result.test[result.metric]:.4g} on the test data")
    lines.append(
        f"{result.parameters:,} parameters ({result.share:.2%} of the model), "
        f"{result.file_bytes / 1e6:.1f} MB, {result.steps:,} steps in {result.seconds:.0f} s"
    )
    return [*lines, f"results: {result.output}"]
