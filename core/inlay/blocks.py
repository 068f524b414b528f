"""Block sites: a forward hook on a transformer block. Blocks keep their class; FSDP needs it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from inlay.context import Slot
from inlay.programs import take_first
from inlay.sites import BlockSite


class BlockPort:
    """The hook itself: runs the block's program on (its first argument, its output)."""

    def __init__(self, slot: Slot, index: int, site: BlockSite) -> None:
        self.slot, self.index, self.site = slot, index, site
        self.program: Any = None
        self.handle: RemovableHandle | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self.slot.call
        program = self.program if call is None else call.table.blocks[self.index]
        if program is None:
            return output
        return program.on(take_first(args, kwargs)[0], output)

    def enter(self) -> None:
        self.handle = self.site.module.register_forward_hook(self, with_kwargs=True)

    def leave(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = None
