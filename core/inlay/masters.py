"""Float32 masters of 16-bit parameters: any torch optimizer steps on these, the model holds them rounded.

In bfloat16 a number near 1 moves in steps of 1/128: an update smaller than half of that is lost each
time. A master keeps it. Adapters are small, so their masters cost little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inlay.errors import ConfigError, TrainingError

MASTERS = "masters"


class Masters(Optimizer):
    """`kind(groups, **settings)`, stepping on float32 copies of what has fewer bits.

    It is an optimizer of the model's own parameters: schedulers, clipping, GradScaler, accelerate and
    `inlay.check_training` see these. A step hands each gradient to its master in float32, lets `kind`
    step, and writes the masters back rounded. Entries that something else changed meanwhile (a
    checkpoint, a method's own step) are taken over, the others keep their master.

    `state_dict` holds the masters, so that a resumed run goes on bit for bit. Gradients gather in
    `gradients`, by default in float32 for float16 parameters, as GradScaler asks, else in the
    parameter's dtype. DDP asks for gradients of that dtype: keep such adapters in bfloat16 or float32.
    """

    def __init__(
        self,
        kind: Callable[..., Optimizer],
        groups: Iterable[Any],
        *,
        gradients: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        self.inner: Optimizer | None = None
        self.gradients = gradients
        self.masters: dict[Tensor, Tensor] = {}
        self._written: dict[Tensor, int] = {}  # the version of each parameter as written back
        super().__init__(groups, {})
        inner = kind([self._mastered(group) for group in self.param_groups], **settings)
        self.inner, self.defaults, self.state = inner, inner.defaults, inner.state
        for mine, own in zip(self.param_groups, inner.param_groups, strict=True):
            mine.update({key: value for key, value in own.items() if key != "params"})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self.inner is not None:
            self.inner.add_param_group(self._mastered(self.param_groups[-1]))
            own = self.inner.param_groups[-1]
            self.param_groups[-1].update({k: v for k, v in own.items() if k != "params"})

    def _mastered(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return a group with masters in the place of its parameters."""
        return {**group, "params": [self._master(p) for p in group["params"]]}

    def _master(self, parameter: Tensor) -> Tensor:
        """Return a new master of a parameter; the parameter itself, where it needs none."""
        master = parameter
        if parameter.dtype.itemsize < 4:
            master = parameter.detach().float()
            self._written[parameter] = parameter._version
            self._gather(parameter)
        self.masters[parameter] = master
        return master

    def _gather(self, parameter: Tensor) -> None:
        """Let the parameter's gradient gather in the dtype it should have."""
        half = parameter.dtype == torch.float16
        dtype = torch.float32 if self.gradients is None and half else self.gradients
        if dtype is not None and dtype != parameter.dtype:
            before, parameter.grad = parameter.grad, None
            parameter.grad_dtype = dtype
            parameter.grad = None if before is None else before.to(dtype)

    # -- a step --------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step on the masters; `closure`, where the optimizer takes one, sees what they give."""
        assert self.inner is not None
        self._follow()
        if closure is None:
            self._hand_over()
            result = self.inner.step()
        else:
            result = self.inner.step(lambda: self._evaluated(closure))
        self._write_back()
        for _, master in self._pairs():
            master.grad = None
        return result

    def _evaluated(self, closure: Callable[[], Any]) -> Any:
        self._write_back()
        loss = closure()
        self._hand_over()
        return loss

    def _follow(self) -> None:
        """Take over the groups' settings, and what else changed the parameters since the last step."""
        assert self.inner is not None
        for mine, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update({key: value for key, value in mine.items() if key != "params"})
        if any(p not in self.masters for group in self.param_groups for p in group["params"]):
            raise TrainingError(
                "the optimizer's parameters were exchanged for others",
                saw="a parameter without a master",
                do="make Masters anew after what replaces parameters (inlay.advance); FSDP keeps its own",
            )
        for parameter, master in self._beside():
            if parameter._version != self._written[parameter]:
                _take_over(parameter, master)

    def _beside(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (parameter, master), the master on the device that the parameter is on by now."""
        for parameter, master in self._pairs():
            if master.device != parameter.device:
                master.data = master.data.to(parameter.device)
            yield parameter, master

    def _hand_over(self) -> None:
        for parameter, master in self._pairs():
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)

    @torch.no_grad()
    def _write_back(self) -> None:
        for parameter, master in self._pairs():
            parameter.copy_(master)
            self._written[parameter] = parameter._version

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (parameter, master) of what has fewer bits than float32."""
        return ((p, m) for p, m in self.masters.items() if m is not p)

    # -- its state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what `kind` keeps, and under "masters" the master of each parameter by its number."""
        assert self.inner is not None
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._follow()
        masters = {n: m.detach() for n, (p, m) in enumerate(self._in_order()) if m is not p}
        state = {**self.inner.state_dict(), MASTERS: masters}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, masters included."""
        assert self.inner is not None
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        wanted = {n: m for n, (p, m) in enumerate(self._in_order()) if m is not p}
        found = dict(state_dict.get(MASTERS, {}))
        _check_masters(wanted, found)
        list(self._beside())
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != MASTERS})
        self.state = self.inner.state
        with torch.no_grad():
            for number, master in wanted.items():
                master.copy_(found[number])
        self._write_back()
        for mine, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            mine.update({key: value for key, value in own.items() if key != "params"})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ("inner", "masters", "gradients", "_written")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def _in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((p, self.masters[p]) for group in self.param_groups for p in group["params"])


@torch.no_grad()
def _take_over(parameter: Tensor, master: Tensor) -> None:
    """Set those entries of a master that do not round to the parameter's to what the parameter has."""
    same = master.to(parameter.dtype) == parameter
    master.copy_(torch.where(same, master, parameter.to(master.dtype)))


def _check_masters(wanted: dict[int, Tensor], found: dict[int, Tensor]) -> None:
    """Raise unless a state holds the masters of exactly these parameters."""
    shapes = [{n: tuple(t.shape) for n, t in tensors.items()} for tensors in (wanted, found)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            "this optimizer's state does not hold the masters of these parameters",
            saw=f"{len(found)} masters in it, {len(wanted)} parameters here have one",
            do="resume with the stack, dtypes and optimizer that the run was begun with",
        )
