"""The model of a request, with its stack, batch and optimizer: real ones, on tensors without values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

import inlay
from inlay import InlayError
from inlay.stack import Stack
from inlay_train import base
from inlay_train.adapted import heads
from inlay_train.estimate.ledger import Ledger
from inlay_train.estimate.quantised import layers, quantise
from inlay_train.estimate.request import DTYPES, Read, Request

ADAPTER = "default"


def few_bit_layers(request: Request, found: Read) -> Mapping[str, nn.Module]:
    """Return the base's quantised layers without weights, by name. To be called where tensors are plain."""
    if request.quantize is None:
        return {}
    skeleton = base.skeleton(found.kind, found.config)
    return layers(skeleton, request.quantize, DTYPES[request.dtype], heads(skeleton))


def model(request: Request, found: Read, few: Mapping[str, nn.Module], ledger: Ledger) -> nn.Module:
    """Return the model in training mode with the stack on it; the ledger says what is base, what adapter."""
    dtype = DTYPES[request.dtype]
    with ledger.during("base"):
        made: Any = found.kind._from_config(found.config, dtype=getattr(torch, dtype))
        if request.quantize is not None:
            quantise(made, few, request.quantize)
    if request.checkpointing:
        _checkpointing(made)
    with ledger.during("adapters"):
        if found.stack is not None:
            _attach(made, found.stack, request, found)
    return made.train()  # type: ignore[no-any-return]


def _attach(made: nn.Module, stack: Stack, request: Request, found: Read) -> None:
    """Attach, with batches for a method that measures the model first."""
    data = (batch(request, found) for _ in itertools.repeat(None))
    try:
        inlay.attach(made, stack, ADAPTER, seed=0, data=itertools.islice(data, 2))
    except InlayError:
        raise
    except Exception as error:
        raise needs_values("attaching the stack", error) from error


def _checkpointing(made: Any) -> None:
    try:
        made.activation_checkpointing_enable()
    except ValueError as error:
        raise InlayError(
            "this model computes no activations twice",
            saw=f"{type(made).__name__}, which does not support gradient checkpointing",
            do="leave out --checkpointing",
        ) from error


def batch(request: Request, found: Read) -> dict[str, Tensor]:
    """Return a batch as the task's collator makes it, every row of full length."""
    ids = torch.ones(request.batch, request.length, dtype=torch.int64)
    made = {"input_ids": ids}
    if request.padded:
        made["attention_mask"] = torch.ones_like(ids)
    if found.task == "classification":
        made["labels"] = torch.ones(request.batch, dtype=torch.int64)
    elif found.task == "seq2seq":
        made["labels"] = torch.ones(request.batch, request.target_length or request.length, dtype=torch.int64)
    else:
        made["labels"] = torch.ones_like(ids)
    return made


def optimizer(request: Request, made: nn.Module, adapted: bool) -> torch.optim.Optimizer:
    """Return the optimizer that the Trainer would make."""
    groups = inlay.parameter_groups(made) if adapted else [{"params": list(made.parameters()), "lr": 1e-5}]
    if request.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if request.optimizer == "sgd":
        return torch.optim.SGD(groups)
    from bitsandbytes.optim import AdamW

    eight, paged = request.optimizer.endswith("8bit"), request.optimizer.startswith("paged")
    with unset_fake_temporarily():  # it makes tables of codes, whose values are computed one by one
        chosen: Any = AdamW(groups, optim_bits=8 if eight else 32, is_paged=paged)
    if eight and not adapted:
        _embeddings_in_full(chosen, made)
    return chosen  # type: ignore[no-any-return]


def _embeddings_in_full(chosen: Any, made: nn.Module) -> None:
    """Keep the state of embeddings in 32 bits, as the Trainer has it, without noting it for the process."""
    chosen.mng = object.__new__(type(chosen.mng))
    chosen.mng.initialize()
    for module in made.modules():
        if isinstance(module, nn.Embedding):
            chosen.mng.pid2config[id(module.weight)] = {"optim_bits": 32}


def states(chosen: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameter, tensor the optimizer keeps for it)."""
    for parameter, state in chosen.state.items():
        yield from ((parameter, value) for value in state.values() if isinstance(value, Tensor))


def needs_values(what: str, error: Exception) -> InlayError:
    """Return the error for code that cannot run on shapes alone."""
    reason = " ".join(str(error).split())[:200]
    return InlayError(
        f"{what} depends on values, so it cannot be counted without them",
        saw=f"{type(error).__name__}: {reason}",
        do="measure a run of one step: inlay train ... --steps 1",
    )
