"""The one place that sets `requires_grad`: the base never learns, adapters as their masks say."""

from __future__ import annotations

from torch import nn

from inlay.errors import RegistryError
from inlay.registry import registry
from inlay.stack import Placed, State


def mask_of(placed: Placed) -> dict[str, bool]:
    """Return the method's own mask, checked to name exactly the adapter's parameters."""
    mask = dict(registry.call("trainable_mask", placed.method, adapter=placed.adapter))
    own = {name for name, _ in placed.adapter.named_parameters()}
    if mask.keys() != own:
        wrong = sorted(mask.keys() ^ own)
        raise RegistryError(
            f"the trainable mask of {placed.method.id!r} does not name the adapter's parameters",
            saw=f"{len(wrong)} names differ, such as {wrong[0]!r}",
            do="return {name: bool} for exactly adapter.named_parameters()",
        )
    return mask


def learning(state: State) -> set[int]:
    """Return the ids of the parameters that should learn: those the trainable parts' masks name."""
    found: set[int] = set()
    for placed in state.placed.values():
        mask = mask_of(placed)
        if placed.trainable and not placed.merged:
            found |= {id(p) for name, p in placed.adapter.named_parameters() if mask[name]}
    return found


def apply(state: State) -> None:
    """Set `requires_grad` of every parameter of the model."""
    masked, state.learning = learning(state), None
    for parameter in state.model.parameters():
        if parameter.requires_grad != (id(parameter) in masked):
            parameter.requires_grad_(id(parameter) in masked)


def remember(model: nn.Module) -> dict[str, bool]:
    """Return every parameter's flag, to be given back by `restore`."""
    return {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}


def restore(model: nn.Module, flags: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in flags:
            parameter.requires_grad_(flags[name])
