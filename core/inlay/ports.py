"""Ports: where a call of the base asks which program runs there.

A host's forward, a block's hook and an attention module's function each have one; all ports of a
model are one numbered list, and a compiled choice of adapters holds one program per number.
"""

from __future__ import annotations

from typing import Any

from torch import nn
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


class BlockPort(Port):
    """A forward hook on a transformer block. Blocks keep their class; FSDP needs it."""

    handle: RemovableHandle | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self.slot.call
        program = self.program if call is None else call.programs[self.index]
        return output if program is None else program.outputs(take_first(args, kwargs)[0], output)

    def enter(self) -> None:
        self.handle = self.module.register_forward_hook(self, with_kwargs=True)

    def leave(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = None
