"""What several processes change: shards and what is gathered (FSDP), or copies of gradients (DDP)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from inlay.anatomy import Anatomy
from inlay_train.estimate.ledger import Ledger
from inlay_train.estimate.request import Request

SHARDED = ("base", "adapters", "gradients", "optimizer")


def spread(ledger: Ledger, model: nn.Module, request: Request) -> None:
    """Let the ledger count what lies on one of the request's devices."""
    if request.processes == 1:
        return
    if not request.fsdp:
        ledger.add("buckets", size(p for p in model.parameters() if p.requires_grad))
        return
    ledger.shares |= dict.fromkeys(SHARDED, 1 / request.processes)
    ledger.add("gathered", gathered(model))


def gathered(model: nn.Module) -> int:
    """Return the bytes of whole parameters, and gradients, that one device holds at a time.

    A block is a unit of its own: two are gathered at a time, one at work and the next on its way. What lies
    in no block is one more, and stays. The gradients of a unit are whole until they are reduced, twice: as
    they are, and in the buffer they are sent from; those of what lies in no block come last.
    """
    blocks = [list(block.module.parameters()) for block in Anatomy(model).blocks]
    inside = {id(p) for block in blocks for p in block}
    rest = [p for p in model.parameters() if id(p) not in inside]
    largest = max((size(block) + _learning(block) for block in blocks), default=0)
    return size(rest) + 2 * max(largest, _learning(rest))


def _learning(unit: Iterable[Tensor]) -> int:
    return size(p for p in unit if p.requires_grad)


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
