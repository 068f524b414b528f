"""What methods that calibrate go through: the user's batches as calls of the model, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inlay.context import BATCH_ARGUMENTS
from inlay.errors import ConfigError
from inlay.sites.site import reference_of


def calls(model: nn.Module, batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield each batch as arguments of `model(**arguments)`, on its device; raise if there is none."""
    device, number = reference_of(model).device, 0
    for batch in batches:
        if not isinstance(batch, Mapping) or not all(isinstance(name, str) for name in batch):
            raise ConfigError(
                "a batch to calibrate on is a mapping of the model's arguments",
                saw=f"batch {number} is a {type(batch).__name__}",
                do='give mappings such as {"input_ids": ..., "labels": ...}, as a DataLoader does',
            )
        number += 1
        yield {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
    if not number:
        raise ConfigError(
            "there is nothing to calibrate on",
            saw="data gave no batch",
            do="give at least one; an iterator that was used up before gives none",
        )


def rows(call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a call's samples one by one, each as a call with a batch of one."""
    tensors = {name: v for name, v in call.items() if isinstance(v, Tensor) and v.dim()}
    first = next((name for name in BATCH_ARGUMENTS if name in tensors), next(iter(tensors), None))
    size = len(tensors[first]) if first else 1
    split = [name for name, tensor in tensors.items() if len(tensor) == size]
    for row in range(size):
        yield {**call, **{name: tensors[name][row : row + 1] for name in split}}


def own_loss(output: Any) -> Sequence[Tensor]:
    """Return the loss that the model computed from labels, or raise."""
    loss = getattr(output, "loss", None)
    if loss is None or not loss.requires_grad:
        raise ConfigError(
            "a batch gives no loss whose gradient could be measured",
            saw="no loss in the model's output" if loss is None else "a loss that no target takes part in",
            do='put "labels" into every batch, and target what takes part',
        )
    return [loss]


def gradients(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    wanted: Collection[int],
    losses: Callable[[Any], Iterable[Tensor]] = own_loss,
) -> Iterator[dict[int, Tensor]]:
    """Yield the gradient of each loss of each call, by parameter id, for those wanted that take part.

    The parameters are stood in for by leaves of their own: the model's flags and gradients stay as
    they are, whether they are frozen or not.
    """
    named = {n: p for n, p in model.named_parameters() if p.is_floating_point()}  # not what is quantised
    values = {n: p.detach().requires_grad_() if id(p) in wanted else p.detach() for n, p in named.items()}
    leaves = {id(p): values[n] for n, p in named.items() if id(p) in wanted}
    for sample in samples:
        for loss in losses(functional_call(model, values, (), dict(sample))):
            found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
            yield {key: g for key, g in zip(leaves, found, strict=True) if g is not None}
