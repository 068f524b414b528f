"""TRL's trainers, of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trl
from torch import nn

import inlay
from inlay import InlayError
from inlay_train.trainer import Adapted
from inlay_trl import head
from inlay_trl.reference import Reference


class Fused(Adapted):
    """For trainers that put a head of TRL's in front of the model's forward: it stands there only at work.

    So that the model can be merged, loaded into, and detached from between.
    """

    def __init__(self, model: nn.Module, args: Any = None, **others: Any) -> None:
        super().__init__(model, args, **others)
        if self.adapter is not None and head.is_adapted(self.model):
            self.model.__dict__.pop("forward", None)
            head.put_whole_head(self.model)
        self._forward = self.model.__dict__.pop("forward", None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_work():
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_work():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_work():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        if self._forward is None:  # at work already: an evaluation during training
            yield
            return
        self.model.__dict__["forward"], self._forward = self._forward, None
        try:
            yield
        finally:  # mixed precision stands there too by now
            self._forward = self.model.__dict__.pop("forward")


class SFTTrainer(Fused, trl.SFTTrainer):
    """`trl.SFTTrainer` that trains the adapter of a model and saves it alone."""

    def __init__(self, model: nn.Module, args: Any = None, **others: Any) -> None:
        _refuse_a_model_to_load(model)
        _refuse_resizing(model, args)
        super().__init__(model, args, **others)


class DPOTrainer(Fused, trl.DPOTrainer):
    """`trl.DPOTrainer` whose reference is the same model with the stack switched off.

    `reference` names the adapters that stay on in it, such as the one of a training before this.
    """

    def __init__(
        self, model: nn.Module, ref_model: Any = None, args: Any = None, *, reference: Sequence[str] = (),
        **others: Any,
    ) -> None:  # fmt: skip
        _refuse_a_model_to_load(model)
        if ref_model is None and inlay.summary(model).parts:
            ref_model = Reference(model, reference)
            _refuse_following(args)
        super().__init__(model, args, ref_model=ref_model, **others)


class RewardTrainer(Adapted, trl.RewardTrainer):
    """`trl.RewardTrainer` that trains the adapter of a classifier (`train=("head",)`) and saves it alone."""

    def __init__(self, model: nn.Module, args: Any = None, **others: Any) -> None:
        _refuse_a_model_to_load(model)
        _refuse_resizing(model, args)
        super().__init__(model, args, **others)


def _refuse_a_model_to_load(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InlayError(
            "a stack cannot be attached to a model that is yet to be loaded",
            saw=f"model={model!r:.80}",
            do="load it (AutoModelForCausalLM.from_pretrained), inlay.attach, then pass the model",
        )


def _refuse_resizing(model: nn.Module, args: Any) -> None:
    """A chat template that brings tokens resizes the vocabulary, and new rows would not be saved."""
    path = str(getattr(args, "chat_template_path", None) or "")
    if path and not path.endswith((".jinja", ".j2")) and inlay.summary(model).parts:
        raise InlayError(
            "a chat template that may resize the vocabulary comes after attaching",
            saw=f"chat_template_path={path!r}",
            do="trl.clone_chat_template(model, tokenizer, path) first, then inlay.attach",
        )


def _refuse_following(args: Any) -> None:
    if getattr(args, "sync_ref_model", False):
        raise InlayError(
            "the reference is the model itself without its stack, which cannot follow the training",
            saw="sync_ref_model=True",
            do="leave sync_ref_model out, or pass ref_model=, a model of its own",
        )
