"""What a conversion did, and its refusals."""

from __future__ import annotations

from dataclasses import dataclass, field

from inlay.errors import InlayError


@dataclass
class Report:
    """What was converted: the method and peft's name for it, at how many sites, how many tensors, and what
    to know about it."""

    method: str
    peft_type: str
    sites: int = 0
    tensors: int = 0
    parameters: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = (
            f"{self.peft_type} as {self.method}: {self.sites} sites, {self.tensors} tensors, "
            f"{self.parameters:,} parameters"
        )
        return "\n".join([head, *(f"note: {note}" for note in self.notes)])


def refused(what: str, *, saw: str, do: str) -> InlayError:
    """Return the error for what has no exact counterpart on the other side."""
    return InlayError(what, saw=saw, do=do)
