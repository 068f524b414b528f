"""What trains in several processes is reached by every backward pass, also what this batch did not need.

DistributedDataParallel averages a parameter's gradient once each process has it, and waits for one
that never comes: of an adapter no row was routed to, an expert without tokens, a block left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.recompute import Bound

if TYPE_CHECKING:
    from inlay.stack import State


class Reached(torch.autograd.Function):
    """Gives a tensor on unchanged; `others` are reached by its backward too, without a gradient.

    Nothing is computed or added for them: where they have a gradient, it stays the same bits. What
    comes out is a view, which torch lets nobody write to; a loss, which some do scale in place, is a copy.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *others: Tensor) -> Tensor:
        ctx.others = len(others)
        return tensor.view_as(tensor) if tensor.dim() else tensor.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient, *[None] * ctx.others)


def several() -> bool:
    """Return whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reaching(state: State, output: Any) -> Any:
    """Return a model's output; what is computed from it reaches all that learns, in backward.

    Not under reentrant checkpointing, which runs backward passes of its own inside this one: torch
    would count a parameter twice.
    """
    if state.learning is None:
        state.learning = [p for _, _, p in state.own_parameters() if p.requires_grad]
    if not state.learning or any(map(_recomputed, state.checkpointed)):
        return output
    anchor: Tensor = Reached.apply(state.learning[0].new_zeros(()), *state.learning)  # type: ignore[no-untyped-call]
    return _tied(output, anchor)


def _tied(output: Any, anchor: Tensor) -> Any:
    """Return an output with its tensors, also those in tuples, lists and by name, tied to `anchor`."""
    if isinstance(output, Tensor):
        return Reached.apply(output, anchor) if output.is_floating_point() else output  # type: ignore[no-untyped-call]
    if type(output) in (tuple, list):
        return type(output)(_tied(value, anchor) for value in output)
    if isinstance(output, dict):  # a ModelOutput is one
        for name, value in output.items():
            output[name] = _tied(value, anchor)
    return output


def _recomputed(module: Any) -> bool:
    function = module.__dict__.get("_gradient_checkpointing_func")
    return bool(module.gradient_checkpointing and isinstance(function, Bound) and function.reentrant)
