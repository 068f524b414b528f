"""A DPO reference that is the trained model itself, with other adapters switched on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

import inlay


class Reference(nn.Module):
    """Calls go to `model`, in which only the adapters `names` act: none named, the bare base.

    It holds no tensor, so there is one copy of the base. What TRL puts on its `forward` never runs:
    the call itself goes to the model, whose forward TRL changes in the same way.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.__dict__["model"] = model  # no child: its tensors are not the reference's
        self.config, self.names = model.config, tuple(names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with inlay.use(self.model, *self.names):
            return self.model(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's: TRL keeps computed log-probabilities under its digest."""
        return self.model.state_dict(*args, **kwargs)
