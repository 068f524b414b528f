"""Training: parameter groups, auxiliary losses, stages, and proof that training does what it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay import masks
from inlay.adapter import Adapter
from inlay.attach import bypassed, refused_while_merged, sites_still_there
from inlay.backends import backend_of
from inlay.errors import ConfigError, RegistryError, StateError, TrainingError, shown
from inlay.lifecycle import unfollowed
from inlay.registry import registry
from inlay.stack import Placed, State, need_state


@dataclass(frozen=True)
class Group:
    """Parameters (local names) that share a learning rate and weight decay (None: the optimizer's)."""

    names: Sequence[str]
    lr: float
    weight_decay: float | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of a method's training, as data.

    `steps` is the length the paper suggests; `finish(adapter)` is what happens at its end: it may
    change the adapter's deltas (select entries, drop a generator) and note it in `adapter.data`.
    """

    name: str
    steps: int | None = None
    finish: Callable[[Adapter], None] | None = None


def parameter_groups(model: nn.Module, lr: float | None = None) -> list[dict[str, Any]]:
    """Return optimizer groups covering every trainable parameter exactly once.

    Each part's method gives its rates; `lr` replaces the methods' default rates. Pass the result
    to any torch optimizer. Weight decay is left to the optimizer where a method does not set it.
    """
    state = need_state(model)
    if isinstance(lr, (int, float)) and not 0 <= lr < math.inf:
        raise ConfigError("this cannot be a learning rate", saw=f"lr={shown(lr)}", do="give one, as 1e-4")
    if any(p.merged for p in state.placed.values()):
        raise refused_while_merged(state, "parameter_groups")
    groups: list[dict[str, Any]] = []
    for placed in state.placed.values():
        placed.adapter.recall()
        parameters = dict(placed.adapter.named_parameters())
        learning = {n for n, p in parameters.items() if p.requires_grad}
        if not learning:
            continue
        answer = registry.call("parameter_groups", placed.method, adapter=placed.adapter, lr=lr)
        named = [name for group in answer for name in group.names]
        if sorted(named) != sorted(learning):
            raise RegistryError(
                f"the parameter groups of {placed.method.id!r} do not cover its trainable parameters once",
                saw=f"{len(named)} names for {len(learning)} parameters",
                do="put each name of adapter.trainable_names() in exactly one group",
            )
        groups += [_group(placed, group, parameters) for group in answer if group.names]
    if not groups:
        raise _nothing_learns(state)
    return groups


def _group(placed: Placed, group: Group, parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "params": [parameters[n] for n in group.names], "lr": group.lr, "name": placed.path,
    }  # fmt: skip
    if group.weight_decay is not None:
        made["weight_decay"] = group.weight_decay
    return made


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Return the sum of the active adapters' extra loss terms (0 if there are none), once per step."""
    state = need_state(model)
    total = torch.zeros((), device=next(model.parameters()).device)
    for number in state.active:
        placed = state.placed[number]
        if registry.implements(placed.method, "auxiliary_loss"):
            term = registry.call("auxiliary_loss", placed.method, adapter=placed.adapter)
            total = total if term is None else total + term.float()
    return total


def stages(model: nn.Module, name: str) -> list[Stage]:
    """Return the stages left for the adapter or part `name` (one, "train", for methods without stages)."""
    found = []
    for placed in need_state(model).find(name):
        if registry.implements(placed.method, "stages"):
            found += registry.call("stages", placed.method, adapter=placed.adapter)
    return found or [Stage("train")]


def advance(model: nn.Module, name: str) -> str | None:
    """End the first stage left of the adapter `name`; return the name of the next one, or None.

    Parameters may be replaced by others: make a new optimizer afterwards.
    """
    state = need_state(model)
    if any(p.merged for p in state.placed.values()):
        raise refused_while_merged(state, "advance")
    for placed in state.find(name):
        if not registry.implements(placed.method, "stages"):
            continue
        left = registry.call("stages", placed.method, adapter=placed.adapter)
        if left:
            if left[0].finish is not None:
                left[0].finish(placed.adapter)
            masks.apply(state)
            state.activate()
            return left[1].name if len(left) > 1 else None
    raise StateError(
        f"{name!r} has no stage left to end", saw="no stages", do="see inlay.stages(model, name)"
    )


def check_training(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, loss: Tensor | None = None
) -> None:
    """Prove that training does what it should; call it after a backward pass.

    Every site is still the module attached to, its forward the one that runs; the optimizer holds
    exactly the masked tensors; each of them has a gradient, and nothing else has; the loss, if it is
    given, is finite. Raises `TrainingError` naming the first tensor that breaks one of these.
    """
    state = need_state(model)
    model = state.model
    if any(p.merged for p in state.placed.values()):
        raise refused_while_merged(state, "check_training")
    if loss is not None and not bool(loss.detach().isfinite().all()):
        raise _diverged(state, loss)
    gone = sites_still_there(state)
    if gone:
        raise TrainingError(
            "modules with adapters were replaced or resized after attaching",
            saw=f"{gone[0]} and {len(gone) - 1} more (resize_token_embeddings does this)",
            do="detach, then attach again: change the model before its adapters",
        )
    if patched := bypassed(state):
        raise TrainingError(
            "a forward was replaced after attaching, so adapters there have no effect",
            saw=f"{patched[0]} and {len(patched) - 1} more",
            do="remove that patch: del module.forward",
        )
    _refuse_offloaded(state)
    layers = ((name, module, backend_of(module)) for name, module in model.named_modules())
    if packed := [name for name, module, backend in layers if backend and backend.inference_only(module)]:
        raise TrainingError(
            "a call in eval mode packed quantised weights for inference, and no gradient passes them now",
            saw=f"{packed[0]} and {len(packed) - 1} more (bitsandbytes does this on the CPU)",
            do="load the model again, and train before the first call in eval mode",
        )
    names = {id(p): n for n, p in model.named_parameters()}
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    own = {id(p) for _, _, p in state.own_parameters()}
    _refuse(
        names,
        learning - own,
        "a base tensor requires a gradient",
        "let inlay.set_trainable choose what learns",
    )
    _refuse(
        names,
        masks.learning(state) - learning,
        "a tensor that should learn is frozen",
        "model.requires_grad_ was called; inlay.set_trainable(model, ...) sets what learns again",
    )
    if not learning:
        raise _nothing_learns(state)
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        _refuse(names, learning - held, "the optimizer misses a trainable tensor",
                "build it from inlay.parameter_groups(model)")  # fmt: skip
        _refuse(names, held - learning, "the optimizer holds a tensor that does not learn",
                "build it from inlay.parameter_groups(model) after attaching")  # fmt: skip
        _refuse_unfollowed(state, optimizer)
    without = {id(p) for p in model.parameters() if p.requires_grad and p.grad is None}
    _refuse(names, without, "a trainable tensor got no gradient",
            "call this after loss.backward(); is its adapter active, its site on the path?")  # fmt: skip
    with_grad = {id(p) for p in model.parameters() if p.grad is not None and not p.requires_grad}
    _refuse(names, with_grad, "a frozen tensor has a gradient", "clear stale gradients: model.zero_grad()")


def _refuse_unfollowed(state: State, optimizer: torch.optim.Optimizer) -> None:
    if waiting := unfollowed(state, optimizer):
        raise TrainingError(
            "a method acts around each optimizer step, and nothing tells it of them",
            saw=f"{waiting[0]}, and an optimizer that is not followed",
            do="call inlay.lifecycle(model, optimizer, steps=...) once, after making the optimizer",
        )


def _nothing_learns(state: State) -> TrainingError:
    return TrainingError(
        "nothing learns",
        saw=f"{len(list(state.own_parameters()))} adapter tensors, all frozen",
        do="inlay.set_trainable(model, name)",
    )


def _diverged(state: State, loss: Tensor) -> TrainingError:
    """Return the error that names the first tensor that is not finite: of the adapters, or a gradient."""
    own = [(placed.path, name, p) for placed, name, p in state.own_parameters()]
    kinds = {
        "values that are not finite": [(path, name, p.detach()) for path, name, p in own],
        "a gradient that is not finite": [
            (path, name, p.grad) for path, name, p in own if p.grad is not None
        ],
    }
    bad = (
        f"{path}: {name} is the first tensor with {what}"
        for what, found in kinds.items() for path, name, tensor in found if not tensor.isfinite().all()
    )  # fmt: skip
    return TrainingError(
        f"training diverged: the loss is {float(loss.detach().sum())}",
        saw=next(bad, "every part's values and gradients are finite, so it is the base or the batch"),
        do="load the last checkpoint, which is of finite values, and lower the learning rate or clip",
    )


def _refuse_offloaded(state: State) -> None:
    learning = ((p, n) for p, n, tensor in state.own_parameters() if tensor.requires_grad and tensor.is_meta)
    gone = [f"{placed.path}: {name}" for placed, name in learning]
    if gone:
        raise TrainingError(
            "trainable tensors are offloaded, and what is offloaded cannot learn",
            saw=f"{gone[0]} ({len(gone)} in all)",
            do="build the optimizer from inlay.parameter_groups(model) after offloading",
        )


def _refuse(names: dict[int, str], wrong: Iterable[int], what: str, do: str) -> None:
    found = sorted(names.get(i, "a tensor that is not in the model") for i in wrong)
    if found:
        raise TrainingError(what, saw=f"{found[0]} ({len(found)} in all)", do=do)
