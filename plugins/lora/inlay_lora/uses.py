"""What an adapter's matrices read and give while the model runs, and how the logits depend on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from inlay.authoring import ConfigError
from inlay.masks import mask_of
from inlay.plan import evaluating
from inlay.stack import need_state


class Use(NamedTuple):
    """One use of a matrix M (o, i) in a call of n samples, t tokens each: `read` (n, t, i), and the
    `gradients` (C, n, t, o) of each of C logits at what it gave. M's gradient is Σ_t g aᵀ."""

    name: str
    read: Tensor
    gradients: Tensor


def matrices(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return what learns of the adapter or part `name`, by path; raise unless it is all matrices."""
    found = {
        f"{placed.part_name}/{local}": parameter
        for placed in need_state(model).find(name)
        for local, parameter in placed.adapter.named_parameters()
        if mask_of(placed)[local]
    }
    if others := [n for n, parameter in found.items() if parameter.dim() != 2]:
        raise refused(others[0], f"of shape {tuple(found[others[0]].shape)}")
    return found


def uses(
    model: nn.Module,
    wanted: Mapping[str, Tensor],
    call: Mapping[str, Any],
    logits: Callable[[Any], Tensor],
) -> tuple[Tensor, list[Use]]:
    """Run the model in evaluation mode; return its logits (n, C) and each use of the wanted matrices."""
    watched = Watched(wanted)
    with evaluating(model), torch.enable_grad(), watched:
        outputs = logits(model(**call))
    if outputs.dim() != 2:
        raise ConfigError(
            "laplace: logits are one row of classes for each sample",
            saw=f"shape {tuple(outputs.shape)}",
            do="give logits=, such as lambda out: out.logits[:, -1, answers]",
        )
    if unseen := wanted.keys() - {name for name, _, _ in watched.seen}:
        raise refused(min(unseen), "never applied by F.linear in its own dtype")
    rows = [
        torch.autograd.grad(
            outputs[:, c].sum(), [y for *_, y in watched.seen], retain_graph=True, allow_unused=True
        )
        for c in range(outputs.shape[1])
    ]
    found = []
    for number, (name, x, y) in enumerate(watched.seen):
        if len(x) != len(outputs):
            raise ConfigError(
                "laplace: a matrix does not read its batch sample by sample",
                saw=f"{name} reads {tuple(x.shape)} in a batch of {len(outputs)}",
                do="name parts that act where samples are apart (not routed experts)",
            )
        given = [torch.zeros_like(y) if row[number] is None else row[number] for row in rows]
        found.append(Use(name, tokens(x), torch.stack([tokens(g) for g in given])))
    return outputs.detach(), found


class Watched(TorchFunctionMode):
    """Notes what `F.linear` reads and gives with the wanted matrices."""

    def __init__(self, wanted: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {(m.data_ptr(), m.shape): name for name, m in wanted.items()}
        self.seen: list[tuple[str, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and torch.is_grad_enabled():
            name = self.names.get((args[1].data_ptr(), args[1].shape))
            if name is not None:
                result = result if result.requires_grad else result.detach().requires_grad_()
                self.seen.append((name, args[0].detach(), result))
        return result


def tokens(x: Tensor) -> Tensor:
    """Return x (n, ..., d) as (n, t, d)."""
    return x.reshape(len(x), -1, x.shape[-1])


def refused(name: str, what: str) -> ConfigError:
    return ConfigError(
        "laplace: a tensor that learned is not the matrix of a linear map",
        saw=f"{name}, {what}",
        do="name a part whose tensors are such matrices, as LoRA's on linear layers, in the model's dtype",
    )
