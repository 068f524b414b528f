"""Scope: a model whose call opens a `Call`, in which values are prepared once for all sites.

The root and every transformers model inside it are scopes; the outermost one called opens.
"""

from __future__ import annotations

import inspect
import os
from functools import partial
from typing import Any

import torch

from inlay.hosts import Host, bind_checkpointing
from inlay.reached import reaching, several


class Scope(Host):
    """Mixin of scopes: the outermost one called opens the call."""

    _inlay_state: Any  # a State; transformers evaluates the annotations of every model class

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self._inlay_state
        slot = state.slot
        outer, forward = slot.call, super().forward
        if state.model is self and torch.is_grad_enabled() and several():
            forward = partial(_reaching, state, forward)
        if self.training and state.checkpointed:
            bind_checkpointing(state.checkpointed, slot)
        if (outer is None and not state.table.scoped) or (outer is not None and outer.model is not None):
            return forward(*args, **kwargs)
        call = (state.default_call() if outer is None else outer).begin(self, args, kwargs)
        slot.call = call
        try:
            call.prepare()
            output = forward(*args, **kwargs)
            call.hand_over(output)
            return output
        finally:
            slot.call = outer
            slot.taps.clear()


def _reaching(state: Any, forward: Any, /, *args: Any, **kwargs: Any) -> Any:
    return reaching(state, forward(*args, **kwargs))


class PretrainedScope(Scope):
    """A scope whose base has `save_pretrained`: writes the adapters' folder beside the base."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save the base model alone, loadable anywhere, and the attached stacks beside it.

        Bring the stacks back with `inlay.load(model, save_directory)`. A model inside the one that
        was attached to saves its own base.
        """
        from inlay.checkpoint import save
        from inlay.stack import base_state_dict

        root, save_base = self._inlay_state.model, super().save_pretrained  # type: ignore[misc]
        within = f"{self._inlay_port.name}." if root is not self else ""
        base = base_state_dict(root)
        own = {key.removeprefix(within): base[key] for key in base if key.startswith(within)}
        if "state_dict" in inspect.signature(save_base).parameters:
            kwargs.setdefault("state_dict", own)
        else:  # diffusers asks the model
            self.__dict__["state_dict"] = lambda *args, **kwargs: own
        try:
            saved = save_base(save_directory, *args, **kwargs)
        finally:
            self.__dict__.pop("state_dict", None)
        if root is self and kwargs.get("is_main_process", True):
            save(self, save_directory, overwrite=True)
        return saved
