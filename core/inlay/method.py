"""`Method`: the configuration of an algorithm, as small frozen data, with every hook answered.

A simple method is a frozen dataclass with its hyperparameters and one function:

    @dataclass(frozen=True)
    class LoRA(Method):
        id = "lora"
        rank: int = setting(8, least=1)

        def delta(self, site, init):
            return LowRank(site, init, self.rank)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from inlay.delta import Fold
from inlay.errors import CannotMerge, RegistryError
from inlay.hookspecs import hookimpl
from inlay.settings import Configured, setting

if TYPE_CHECKING:
    from torch import Tensor

    from inlay.adapter import Adapter, Init
    from inlay.delta import Delta
    from inlay.sites import Site
    from inlay.stack import Part, Stack
    from inlay.training import Group

Layers = int | str | Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class Method(Configured):
    """Base of all methods. Subclasses are frozen dataclasses; their fields are hyperparameters.

    Class attributes describe the algorithm: `id` (its name in files), `paper` (arXiv id),
    `accepts` (site kinds), `default_targets` (each must match), `optional_targets` (more defaults,
    taken where the model has them and the method suits them), `lr` (a rate at which it learns in
    about a hundred AdamW steps), `weight_decay`, `starts_as_identity`, `prepares` (has a `prepare`
    hook), `calibrates` (has a `calibrate` hook and must see data first; a property where settings
    decide), `reads_call` (its deltas look at `at.call`: mask, tasks, cache).
    """

    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    accepts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    optional_targets: ClassVar[tuple[str, ...]] = ()
    lr: ClassVar[float] = 1e-3
    weight_decay: ClassVar[float | None] = None
    starts_as_identity: ClassVar[bool] = True
    prepares: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    reads_call: ClassVar[bool] = False

    targets: tuple[str, ...] | None = setting(None)
    layers: tuple[int, ...] | str | None = setting(None)

    def delta(self, site: Site, init: Init) -> Delta:
        """Return the delta of one site, its tensors made with `init`. The one thing to write."""
        raise RegistryError(
            f"the method {self.id!r} does not say what its delta is",
            saw=f"{type(self).__name__} defines neither delta() nor inject()",
            do="define delta(self, site, init), returning the delta of one site",
        )

    def parts(self) -> Mapping[str, Method]:
        """Return the methods inside this one, by name (see `inlay.authoring.Composite`)."""
        return {}

    def inside(self) -> dict[str, Method]:
        """Return `parts()`; the targets and layers of this method hold for those that name none."""
        given = {n: getattr(self, n) for n in ("targets", "layers") if getattr(self, n) is not None}
        return {
            name: dataclasses.replace(part, **{n: v for n, v in given.items() if getattr(part, n) is None})
            for name, part in self.parts().items()
        }

    def suits(self, site: Site) -> bool:
        """Whether the method can act at a site that a role or pattern matched; others are left out."""
        return True

    def unsuited(self) -> str:
        """Say what to do when it suits none of them."""
        return "choose other targets"

    def named(self, name: str) -> Part:
        """Return this method as a part of a stack under `name`."""
        from inlay.stack import Part

        return Part(name, self)

    def __add__(self, other: Method | Part | Stack) -> Stack:
        from inlay.stack import Stack

        return Stack.of(self) + other

    @staticmethod
    @hookimpl
    def inject(method: Method, sites: Sequence[Site], adapter: Adapter) -> int:
        for site in sites:
            adapter.place(site, method.delta(site, adapter.init(site)))
        return len(sites)

    @staticmethod
    @hookimpl
    def trainable_mask(method: Method, adapter: Adapter) -> dict[str, bool]:
        return {name: True for name, _ in adapter.named_parameters()}

    @staticmethod
    @hookimpl
    def merge(method: Method, adapter: Adapter) -> dict[Site, Fold]:
        return default_folds(method, adapter)

    @staticmethod
    @hookimpl
    def state_dict(method: Method, adapter: Adapter) -> dict[str, Tensor]:
        return adapter.tensors()

    @staticmethod
    @hookimpl
    def parameter_groups(method: Method, adapter: Adapter, lr: float | None) -> list[Group]:
        from inlay.training import Group

        rate = method.lr if lr is None else lr
        return [Group(adapter.trainable_names(), rate, method.weight_decay)]


def default_folds(method: Method, adapter: Adapter) -> dict[Site, Fold]:
    """Return each site's fold, chaining its deltas; raise `CannotMerge` if one has none."""
    folds: dict[Site, Fold] = {}
    for site, delta in adapter.placed:
        if not delta.folds:
            raise CannotMerge(
                f"{method.id!r} cannot be merged",
                saw=f"at {site.name}: {delta.why_not()}",
                do="keep it attached, or name the other parts: inlay.merge(model, parts=[...])",
            )
        folds[site] = chain(folds[site], delta.fold) if site in folds else delta.fold
    return folds


def chain(first: Fold, second: Fold) -> Fold:
    """Return the fold that applies `first`, then `second`."""
    return lambda weight, bias: second(*first(weight, bias))
