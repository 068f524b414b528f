"""One training step, as the Trainer does it, on tensors without values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import inlay
from inlay_train.estimate import build
from inlay_train.estimate.ledger import Ledger
from inlay_train.estimate.request import Read, Request
from inlay_train.estimate.sharding import spread

CUDA_BLOCK = 512  # bytes that torch's allocator of a GPU rounds up to
PAGED = 100_000  # bitsandbytes pages the state of parameters with at least so many entries


class Counted:
    """A step that was counted: the ledger at its end, and what the model turned out to be."""

    def __init__(self, request: Request, found: Read) -> None:
        self.request, self.found = request, found
        self.adapted = found.stack is not None
        self.ledger = Ledger(block=CUDA_BLOCK if request.device == "cuda" else 1)
        self.kept = self.learning = 0
        self.parts: list[tuple[str, int]] = []

    def run(self) -> Counted:
        """Build everything, take one step for what the optimizer keeps, and count the next."""
        few = build.few_bit_layers(self.request, self.found)
        with values_unneeded(self.request), self.ledger:
            model = build.model(self.request, self.found, few, self.ledger)
            self._name_parts(model)
            chosen = build.optimizer(self.request, model, self.adapted)
            self._first_step(model, chosen)
            with self.ledger.during("batch"):
                batches = [build.batch(self.request, self.found) for _ in range(self.request.accumulate)]
            self._hook(model)
            spread(self.ledger, model, self.request)
            self.ledger.mark()
            self._step(model, chosen, batches)
        return self

    def _name_parts(self, model: nn.Module) -> None:
        shown = inlay.summary(model).parts
        self.parts = [(part.path.partition("/")[2], part.parameters) for part in shown]
        self.learning = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def _first_step(self, model: nn.Module, chosen: torch.optim.Optimizer) -> None:
        for parameter in self._trainable(model):
            parameter.grad = torch.zeros_like(parameter)
        self._update(model, chosen)
        for parameter, state in build.states(chosen):
            paged = self.request.optimizer.startswith("paged") and self.request.device != "cpu"
            self.ledger.book([state], "paged" if paged and parameter.numel() >= PAGED else "optimizer")
        if self.request.device != "cpu":
            self.ledger.shares["paged"] = 0.0

    def _update(self, model: nn.Module, chosen: torch.optim.Optimizer) -> None:
        with self.ledger.during("temporary"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of paging, which a processor has none of
            torch.nn.utils.clip_grad_norm_(self._trainable(model), 1.0)
            chosen.step()
            model.zero_grad()

    def _hook(self, model: nn.Module) -> None:
        """Book each gradient as one when it is there to stay."""
        for parameter in self._trainable(model):
            parameter.register_post_accumulate_grad_hook(lambda p: self.ledger.book([p.grad], "gradients"))

    def _step(self, model: Any, chosen: torch.optim.Optimizer, batches: list[dict[str, Tensor]]) -> None:
        try:
            for batch in batches:
                self.ledger.phase = "forward"
                with self.ledger.during("activations"):
                    loss = model(**batch).loss
                    if self.adapted:
                        loss = loss + inlay.auxiliary_loss(model)
                self.kept = max(self.kept, self.ledger.live["activations"])
                self.ledger.phase = "backward"
                with self.ledger.during("temporary"):
                    loss.backward()
                del loss
            self.ledger.phase = "the optimizer's step"
            self._update(model, chosen)
        except inlay.InlayError:
            raise
        except Exception as error:
            raise build.needs_values("a step of this model", error) from error

    def _trainable(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def values_unneeded(request: Request) -> Iterator[None]:
    """Let code run on shapes alone, choosing the kernels that the device would have."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if request.device == "cuda":
            stack.enter_context(FusedAttention())
        yield


class FusedAttention(TorchFunctionMode):
    """Attention that never keeps its matrix of weights: on a processor, only dropout makes torch keep it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
