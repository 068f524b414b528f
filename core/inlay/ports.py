"""Ports: where a call of the base asks which program runs there.

A host's forward, a block's hook and an attention module's function each have one; all ports of a
model are one numbered list, and a compiled choice of adapters holds one program per number.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from inlay.context import Slot, take_first


class Port:
    """One such place: its module and name in the model, the model's slot, the program by default."""

    lasting = False  # whether it stays until the last adapter goes

    def __init__(self, slot: Slot, name: str, module: nn.Module) -> None:
        self.slot, self.name, self.module = slot, name, module
        self.index = -1
        self.program: Any = None

    def check(self) -> None:
        """Raise if the module cannot have this port; the module is untouched."""

    def enter(self) -> None:
        raise NotImplementedError

    def leave(self) -> None:
        raise NotImplementedError


class Entered(Exception):  # noqa: N818 - no error: a run reached the block it was to reach
    """What a block would have read."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class BlockPort(Port):
    """Forward hooks on a transformer block. Blocks keep their class; FSDP needs it."""

    handles: tuple[RemovableHandle, ...] = ()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the program change what the block reads."""
        call = self.slot.call
        if call is not None and call.until is module:
            raise Entered(take_first(args, kwargs)[0])
        program = self.program if call is None else call.programs[self.index]
        return None if program is None else program.inputs(args, kwargs)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self.slot.call
        program = self.program if call is None else call.programs[self.index]
        return output if program is None else program.outputs(take_first(args, kwargs)[0], output)

    def enter(self) -> None:
        before = self.module.register_forward_pre_hook(self.before, with_kwargs=True)
        self.handles = (before, self.module.register_forward_hook(self, with_kwargs=True))

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = ()
