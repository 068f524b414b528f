"""Trainers of models with an attached stack: what learns is what is saved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput, set_seed

import inlay
from inlay import InlayError
from inlay.masters import Masters
from inlay_train import adapted, card, diverged, items, processes, resumable, sampling


class Adapted:
    """What makes a trainer one of adapters: goes in front of `transformers.Trainer` or a subclass of it.

        class SFTTrainer(Adapted, trl.SFTTrainer): ...

    The adapter `adapter` of the model is trained; everything else is as in the class behind. Checkpoints
    hold the adapter (`inlay.load` reads them), optimizer, scheduler and random state, and not the base.
    Each part learns at its method's own rate times `rate`; `lr` replaces these rates
    (`args.learning_rate` is not used); with `masters` the optimizer steps on float32 copies of what has
    16 bits (`inlay.masters`). Extra losses of methods are added; a method's stages are walked,
    each with an optimizer of its own and all the steps that `args` say. A loss or gradient that is
    not finite ends training before it is used. `adapter` may be left out where one adapter learns.

    Without an adapter the model trains as the class behind trains it.
    """

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments | None = None,
        *,
        adapter: str | None = None,
        lr: float | None = None,
        rate: float = 1.0,
        masters: bool = False,
        **others: Any,
    ) -> None:
        self.adapter = adapter if adapter is not None else adapted.learning_adapter(model)
        self.lr, self.rate, self.masters = lr, rate, masters
        self._stages = self._left(model)
        self._stage = 0
        self._restored: Path | None = None
        self._checked = False
        self._four_bit = adapted.four_bit_layers(model)
        self._config = adapted.aligned(model)
        with adapted.quantised_base_accepted(model, self.adapter):
            super().__init__(model=model, args=args, **others)
        self.model_accepts_loss_kwargs &= items.counts_items(model)
        if len(self._stages) > 1 and self.optimizer is not None:
            raise InlayError(
                "a method with stages needs a new optimizer for each, so none can be given",
                saw=f"{type(self.optimizer).__name__}, and the stages {', '.join(self._stages)}",
                do="leave out optimizers=; choose one by TrainingArguments(optim=...)",
            )

    # -- what learns ---------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer of `args.optim` over the parts' own groups."""
        if self.adapter is not None and self.optimizer is None:
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.model
            )
            self._refuse_foreign(settings.pop("optimizer_dict", ()))
            groups = inlay.parameter_groups(self.model, lr=self.lr)
            decay = {"weight_decay": self.args.weight_decay}  # where a method sets none
            groups = [{**decay, **group, "lr": group["lr"] * self.rate} for group in groups]
            made = Masters(kind, groups, **settings) if self.masters else kind(groups, **settings)
            self.optimizer = made
        return super().create_optimizer(model)

    def _refuse_foreign(self, groups: Any) -> None:
        """Raise if an engine's own groups hold more than the model's (sentence-transformers: a loss's)."""
        own = {id(p) for p in self.model.parameters()}
        foreign = [p for group in groups for p in group["params"] if id(p) not in own]
        if foreign:
            raise InlayError(
                "the loss has parameters of its own, which an adapter's checkpoint would not hold",
                saw=f"{len(foreign)} tensors outside the model, the first of shape {tuple(foreign[0].shape)}",
                do="choose a loss without parameters, or make its layer a part of the model (train=)",
            )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return transformers' schedule; methods that act around a step are told how many come."""
        if self.adapter is not None:
            self.lifecycle = inlay.lifecycle(self.model, self.optimizer, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.adapter is not None and self.args.should_save:
            torch.save(self.lifecycle.state_dict(), Path(output_dir) / resumable.LIFECYCLE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.adapter is not None and checkpoint is not None:
            saved = torch.load(Path(checkpoint) / resumable.LIFECYCLE, weights_only=True)
            self.lifecycle.load_state_dict(saved)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the engine's loss, in training with the methods' extra terms, once per optimizer step."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = found if return_outputs else (found,)
        if self.adapter is not None and model.training:
            scaled = self.loss_is_scaled_for_ga
            if scaled is None:  # as transformers decides it
                whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                scaled = whole or self.compute_loss_func is not None
            steps = self.current_gradient_accumulation_steps if scaled else 1
            loss = loss + inlay.auxiliary_loss(self.model) / steps
        return (loss, *outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run transformers' step; stop if its loss is not finite; once, prove that what should learn does."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise diverged.error(self, f"the loss is {loss.item()} in {self._now}", inputs)
        if self.adapter is not None and not self._checked:
            inlay.check_training(self.model, self.optimizer)
            self._checked = True
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # which skips such steps itself
        if not scaled and not torch.as_tensor(norm).isfinite():
            raise diverged.error(self, f"the gradient's norm is {float(norm)} in {self._now}")
        return norm

    @property
    def _now(self) -> str:
        return f"step {self.state.global_step + 1}"

    def prediction_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict as transformers does; 4-bit layers stay unpacked, or no gradient would pass them again."""
        for layer in self._four_bit:
            layer.training = True
        return super().prediction_step(model, *args, **kwargs)

    # -- the order of rows ---------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch = self.args.train_batch_size * self.args.world_size
        return sampling.ByLength(sampling.lengths(dataset), batch, seed)

    # -- stages and resuming -------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train through all stages; `resume_from_checkpoint=True`: from the last complete checkpoint on."""
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if checkpoint is not None:
            self._load_from_checkpoint(str(checkpoint))
        best = self.args.load_best_model_at_end
        while True:
            left = self._left(self.model)
            self._stage = len(self._stages) - len(left)
            self.args.load_best_model_at_end = best and len(left) == 1
            try:
                output = self._train_stage(checkpoint, *args, **kwargs)
            finally:
                self.args.load_best_model_at_end = best
            if len(left) == 1:
                return output
            for path, stages in self._stages_of_parts(self.model).items():
                if len(stages) > 1:
                    inlay.advance(self.model, path)
            self.optimizer, self.lr_scheduler, checkpoint = None, None, None
            self.model_wrapped = self.model  # what DDP noted of the stage before is of that stage

    def _train_stage(self, checkpoint: Path | None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._checked = False
        set_seed(self.args.seed + self._stage)  # where resumed too: the order of rows begins with it
        if checkpoint is None:
            return super().train(None, *args, **kwargs)
        state = TrainerState.load_from_json(str(checkpoint / resumable.MARK))
        steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if state.global_step < steps:
            return super().train(str(checkpoint), *args, **kwargs)
        self.state = state  # nothing is left to train: transformers would train a step too many
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    def _left(self, model: nn.Module) -> list[str]:
        """Return the stages left, those of the part with most: the parts go on to the next together."""
        return max(self._stages_of_parts(model).values(), key=len, default=["train"])

    def _stages_of_parts(self, model: nn.Module) -> dict[str, list[str]]:
        paths = [p.path for p in inlay.summary(model).parts if p.path.partition("/")[0] == self.adapter]
        return {path: [stage.name for stage in inlay.stages(model, path)] for path in paths}

    def _checkpoint(self, wanted: str | bool | None) -> Path | None:
        if not wanted:
            return None
        found = Path(wanted) if isinstance(wanted, str) else self.last_checkpoint()
        if found is None or not resumable.is_complete(found):
            raise InlayError(
                "there is no complete checkpoint to resume from",
                saw=f"{found or self.args.output_dir}",
                do="start anew, without resume_from_checkpoint",
            )
        return found

    def last_checkpoint(self) -> Path | None:
        """Return the last complete checkpoint of the furthest stage, or None."""
        folders = [self._folder(number) for number in reversed(range(len(self._stages)))]
        return next((found for folder in folders if (found := resumable.last(folder))), None)

    def _folder(self, stage: int) -> Path:
        output = Path(self.args.output_dir)
        return output if len(self._stages) == 1 else output / f"_stage-{stage + 1}"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder(self._stage)) if trial is None else str(super()._get_output_dir(trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self._restored != Path(resume_from_checkpoint):
            self._restore(Path(resume_from_checkpoint))
            self._restored = Path(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.adapter is None:
            super()._load_best_model()
        else:
            self._restore(Path(str(self.state.best_model_checkpoint)))

    def _restore(self, folder: Path) -> None:
        """Put a checkpoint's adapter in the place of the attached one, which must be the topmost."""
        names = list(dict.fromkeys(adapted.adapters(self.model)))
        if names[-1] != self.adapter:
            raise InlayError(
                "a checkpoint can be restored only where its adapter is the topmost",
                saw=f"{', '.join(map(repr, names))}, and {self.adapter!r} is trained",
                do="attach the adapter to be trained last",
            )
        with self._own_config(), adapted.own_forward(self.model):
            resumable.check_same(self.model, self.adapter, folder)
            inlay.load(self.model, folder, f"{self.adapter}, read", activate=False, trainable=False)
            inlay.detach(self.model, f"{self.adapter}, read")  # so it is whole, and may replace the other
            inlay.detach(self.model, self.adapter)
            inlay.load(self.model, folder, self.adapter)

    # -- saving --------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if diverged.bad_tensors(self):
            raise diverged.error(self, f"trained values are not finite after step {self.state.global_step}")
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, InlayError) as error:
            reason = resumable.not_written(error)
            if not reason:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise resumable.cannot_write(folder, reason, self.last_checkpoint()) from error

    def _save_rng_state(self, output_dir: str) -> None:
        """Save each process's random state; only then is the checkpoint marked as complete."""
        super()._save_rng_state(output_dir)
        processes.gathered(None)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the adapter alone; the tokenizer too where this is the result and not a checkpoint."""
        folder = self.args.output_dir if output_dir is None else output_dir
        if self.adapter is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            with self._own_config():
                inlay.save(self.model, folder, self.adapter, overwrite=True)
            if folder == self.args.output_dir and self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md: what it is, for which base, how to load it, its figures."""
        if self.adapter is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            text = card.of(self, kwargs.get("tags") or ())
            (Path(self.args.output_dir) / "README.md").write_text(text, encoding="utf-8")

    @contextmanager
    def _own_config(self) -> Iterator[None]:
        """Give the base's configuration its own values back for a while: they are part of its identity."""
        now = adapted.aligned(self.model)
        adapted.align(self.model, self._config)
        try:
            yield
        finally:
            adapted.align(self.model, now)


class Trainer(Adapted, transformers.Trainer):
    """Trains the adapter `adapter` of a model; everything else is transformers'."""
