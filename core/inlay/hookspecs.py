"""The contract between core and methods: signatures and meaning, no logic.

A method is a frozen dataclass (`inlay.method.Method`) whose hook implementations are static
methods marked `@hookimpl`. `Method` answers every hook already, so a simple method overrides one
plain function, `delta(self, site, init)`, and none of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inlay.adapter import Adapter
    from inlay.context import Call
    from inlay.delta import Fold
    from inlay.lifecycle import Step
    from inlay.method import Method
    from inlay.sites import Site
    from inlay.training import Group, Stage

PROJECT = "inlay"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def inject(method: Method, sites: Sequence[Site], adapter: Adapter) -> object:
    """Place deltas on resolved sites with `adapter.place(site, delta)`; return anything but None.

    It never searches the model. The model is still untouched while this runs, so raising leaves
    it bit-identical. Called once when attaching and once more, on meta tensors, when loading.
    """


@hookspec(firstresult=True)
def trainable_mask(method: Method, adapter: Adapter) -> Mapping[str, bool]:
    """Say of each of the adapter's own parameters, by local name, whether it learns."""


@hookspec(firstresult=True)
def merge(method: Method, adapter: Adapter) -> Mapping[Site, Fold]:
    """Return the fold `(weight, bias) -> (weight, bias)` of each site, or raise `CannotMerge`.

    Folds are pure functions on float32 tensors in (out, in) orientation. Core reads and writes
    the base's weights; a method never does.
    """


@hookspec(firstresult=True)
def state_dict(method: Method, adapter: Adapter) -> Mapping[str, Tensor]:
    """Return every tensor that must be saved, under its local name."""


@hookspec(firstresult=True)
def migrate(method: Method, state: Mapping[str, Tensor], from_version: int) -> Mapping[str, Tensor]:
    """Translate saved tensors of an older `version` of the method; the result is checked again."""


@hookspec(firstresult=True)
def calibrate(
    method: Method, model: nn.Module, sites: Sequence[Site], batches: Iterable[Any]
) -> Mapping[str, Tensor]:
    """Measure the bare model before `inject`; asked for only if the method's `calibrates` is true.

    The model is in evaluation mode, without adapters, and stays as it is; `batches` can be gone
    through again. The result is `adapter.calibration` in `inject`; what is left in it is saved.
    """


@hookspec(firstresult=True)
def prepare(method: Method, adapter: Adapter, call: Call) -> Mapping[str, Tensor]:
    """Compute tensors once per call of the model, before its first site; read as `at.prepared`.

    Runs outside checkpointed regions: blocks see detached leaves under reentrant checkpointing
    and core hands their gradient back once. Asked for only if the method's `prepares` is true.
    """


@hookspec(firstresult=True)
def auxiliary_loss(method: Method, adapter: Adapter) -> Tensor | None:
    """Return this adapter's extra loss term (a scalar), or None."""


@hookspec(firstresult=True)
def before_step(method: Method, adapter: Adapter, step: Step) -> None:
    """Act before the first forward pass of an optimizer step, as drawing what it samples.

    Runs again when a run is resumed, so what it does may depend on `step` and the adapter alone; it
    draws with `step.generator()`, which gives every process the same.
    """


@hookspec(firstresult=True)
def after_backward(method: Method, adapter: Adapter, step: Step) -> None:
    """Act when all gradients of an optimizer step are there, unscaled, and before they are used."""


@hookspec(firstresult=True)
def after_step(method: Method, adapter: Adapter, step: Step) -> None:
    """Act after the optimizer's step; the gradients it used are still there."""


@hookspec(firstresult=True)
def parameter_groups(method: Method, adapter: Adapter, lr: float | None) -> Sequence[Group]:
    """Split the adapter's trainable parameters into optimizer groups; each in exactly one."""


@hookspec(firstresult=True)
def stages(method: Method, adapter: Adapter) -> Sequence[Stage]:
    """Describe the method's training stages as data; `inlay.advance` walks them."""
