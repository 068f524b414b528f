"""What methods do around each optimizer step, driven by the optimizer itself, so by any training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from inlay.adapter import Adapter
from inlay.attach import refused_while_merged
from inlay.errors import CheckpointError, ConfigError, shown
from inlay.method import Method
from inlay.registry import registry
from inlay.stack import State, need_state

HOOKS = ("before_step", "after_backward", "after_step")


class Step:
    """One step of the optimizer, as a method's hooks see it.

    `number` counts from 1, `total` is how many there will be (None: not known). `memory` holds the
    tensors that the method keeps from step to step; they are saved with the optimizer's state.
    """

    def __init__(self, number: int, total: int | None, seed: str, memory: dict[str, Tensor]) -> None:
        self.number, self.total, self.memory, self._seed = number, total, memory, seed

    def generator(self) -> torch.Generator:
        """Return a random state of this step's own: the same on every process, and when resumed."""
        digest = hashlib.sha256(f"{self._seed}/{self.number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class Lifecycle:
    """Follows an optimizer's steps and lets the parts that learn act around them (see `lifecycle`).

    `step` is how many steps were made.
    """

    def __init__(self, state: State, optimizer: torch.optim.Optimizer, total: int | None) -> None:
        self.state, self.total, self.step = state, total, 0
        self._memories: dict[str, dict[str, Tensor]] = {}
        self._call("before_step")  # first, since a method may refuse
        self._handles = [
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        ]

    def remove(self) -> None:
        """Follow the optimizer no longer."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the number of steps made and each part's memory."""
        return {"step": self.step, "parts": {path: dict(m) for path, m in self._memories.items() if m}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; raises `CheckpointError` if it is of another stack."""
        known = {path for path, *_ in learning(self.state)}
        if unknown := sorted(saved["parts"].keys() - known):
            raise CheckpointError(
                "this is the training state of another stack",
                saw=f"it names {shown(unknown[0])}; learning: {', '.join(map(repr, sorted(known)))}",
                do="resume with the stack that was trained",
            )
        self.step = int(saved["step"])
        self._memories = {path: dict(memory) for path, memory in saved["parts"].items()}
        self._call("before_step")

    def _before_update(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gradients are there: let methods see them. A closure (Lightning) makes them within the step."""
        given = dict(zip(("optimizer", "closure"), args, strict=False)) | kwargs
        closure = given.get("closure")
        if closure is None:
            self._call("after_backward")
            return None
        waiting = ["after_backward"]

        def evaluated() -> Any:
            loss = closure()
            while waiting:  # once, however often the optimizer evaluates
                self._call(waiting.pop())
            return loss

        return (given.pop("optimizer"),), {**given, "closure": evaluated}

    def _after_update(self, *_: Any) -> None:
        self._call("after_step")
        self.step += 1
        self._call("before_step")

    def _call(self, hook: str) -> None:
        with torch.no_grad():
            for path, method, adapter in learning(self.state):
                if registry.implements(method, hook):
                    memory = self._memories.setdefault(path, {})
                    now = Step(self.step + 1, self.total, f"{adapter.seed}/{path}", memory)
                    registry.call(hook, method, adapter=adapter, step=now)


def lifecycle(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int | None = None) -> Lifecycle:
    """Let the methods that learn act around each of the optimizer's `steps`, whatever loop makes them.

    Call it once after making the optimizer. Methods' hooks then run by the optimizer's own:
    `before_step` (now, and after each step for the next), `after_backward` when the optimizer is about
    to use the gradients, `after_step` when it has. So a step is counted once however many batches
    are accumulated for it, and one that a loss scaler skips is no step. The result has `state_dict`
    and `load_state_dict`, for resuming. Raises `ConfigError` for steps that are no
    whole number, `StateError` while parts are merged.
    """
    state = need_state(model)
    if any(p.merged for p in state.placed.values()):
        raise refused_while_merged(state, "lifecycle")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ConfigError(
            "this cannot be a number of optimizer steps",
            saw=f"steps={shown(steps)}",
            do="give how many steps the run will make, or leave it out where no method asks for it",
        )
    inner = unwrapped(optimizer)
    earlier, made = following(state, inner), Lifecycle(state, inner, steps)
    for other in earlier:
        other.remove()
    return made


def learning(state: State) -> Iterator[tuple[str, Method, Adapter]]:
    """Yield each part that learns and the methods inside it: path, method, adapter."""
    for placed in state.placed.values():
        if placed.trainable and not placed.merged:
            yield from _inside(placed.path, placed.method, placed.adapter)


def _inside(path: str, method: Method, adapter: Adapter) -> Iterator[tuple[str, Method, Adapter]]:
    yield path, method, adapter
    for name, part in method.inside().items():
        if name in adapter.children:
            yield from _inside(f"{path}/{name}", part, adapter.children[name])


def following(state: State, optimizer: torch.optim.Optimizer) -> list[Lifecycle]:
    """Return the lifecycles of the model that follow an optimizer."""
    found = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values())
    return [f for f in found if isinstance(f, Lifecycle) and f.state is state]


def unfollowed(state: State, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the parts whose methods act around steps, if no lifecycle of the model follows the optimizer."""
    if following(state, unwrapped(optimizer)):
        return []
    return [path for path, method, _ in learning(state) if any(registry.implements(method, h) for h in HOOKS)]


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside those of accelerate and its like."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    found: torch.optim.Optimizer = optimizer
    return found
