"""Changes of chosen entries of the base's tensors: the tensors, their best entries, their deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inlay.adapter import Adapter, Init
from inlay.authoring.trained import shapes
from inlay.delta import Change, Compact, Ref, WeightDelta, Weights
from inlay.errors import ConfigError
from inlay.sites import ModuleSite, Site


class Entries(nn.Module):
    """The change of one tensor: `values` (k,), zero at the start, at flat `indices` (k,).

    Where `whole`, of the tensor's shape, is given, it is added: every entry learns, until `keep` says
    which go on. Without values, and nothing whole, there is no change.
    """

    values: nn.Parameter | None
    whole: nn.Parameter | None
    indices: Tensor | None

    def __init__(
        self,
        values: nn.Parameter | None = None,
        indices: Tensor | None = None,
        whole: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.values, self.whole = values, whole
        indices = None if indices is None or values is None else indices.to(values.device)
        self.register_buffer("indices", indices, persistent=False)

    def forward(self) -> Tensor | Compact | None:
        if self.values is None or self.indices is None:
            return self.whole
        kept = Compact(self.indices, self.values)
        return kept if self.whole is None else self.whole + kept.dense(self.whole)

    def moved(self) -> Tensor:
        """Return |whole| (n,), below 0 at the entries that were chosen already."""
        assert self.whole is not None
        moved = self.whole.detach().abs().flatten()
        return moved if self.indices is None else moved.index_fill(0, self.indices.long(), -1.0)

    def keep(self, chosen: Tensor | None) -> None:
        """Let the entries at `chosen` (k,), too, go on, from zero; what is whole goes."""
        assert self.whole is not None
        dense, self.whole = torch.zeros_like(self.whole).flatten(), None
        if chosen is None:
            return
        if self.values is not None and self.indices is not None:
            dense[self.indices.long()] = self.values.detach()
            chosen = torch.cat([self.indices, chosen]).sort().values
        self.indices, self.values = chosen, nn.Parameter(dense[chosen.long()])


class EntriesDelta(WeightDelta):
    """W' = W + δ_W, b' = b + δ_b, zero but for chosen entries; a tied tensor has one δ for all its uses."""

    def __init__(self, weight: Entries | Ref | None = None, bias: Entries | Ref | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, level: Weights) -> Change:
        weight = None if self.weight is None else self.weight()
        return Change(weight, None if self.bias is None else self.bias())


class Place(NamedTuple):
    """A "weight" or "bias" at a site. `label` names it; `key` is the same wherever the tensor is tied to."""

    site: ModuleSite
    name: str
    tensor: Tensor

    @property
    def label(self) -> str:
        return f"{self.site.name}.{self.name}"

    @property
    def key(self) -> Any:
        return id(self.tensor), self.site.part, self.site.expert

    def view(self, tensor: Tensor) -> Tensor:
        """Return a tensor shaped like this one as folds see it: (out, in), cut to the site's slice."""
        return self.site.cut(tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape as folds see it; of a layer in few bits, that of its values."""
        return shapes(self.site)[self.name == "bias"]

    @property
    def size(self) -> int:
        return self.view(self.tensor).numel()


def places(sites: Iterable[Site]) -> list[Place]:
    """Return the tensors of the sites in order, at every use of a tied one."""
    found: list[Place] = []
    for site in sites:
        assert isinstance(site, ModuleSite)
        tensors = {"weight": site.tensor(site.weight_name), "bias": site.tensor(site.bias_name)}
        found += [Place(site, name, tensor) for name, tensor in tensors.items() if tensor is not None]
    return found


def distinct(found: Sequence[Place]) -> list[Place]:
    """Return each tensor once, where it is used first."""
    return list({place.key: place for place in reversed(found)}.values())[::-1]


def largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return the flat indices (k,), ascending, of the `count` largest of all scores, by name.

    Exactly `count`, of equal ones the first: a threshold alone takes too many where scores are
    equal, as zeros are.
    """
    if wrong := [name for name, score in scores.items() if not bool(score.isfinite().all())]:
        raise ConfigError(
            "a score is not finite, so no entries can be chosen by it",
            saw=f"{wrong[0]} and {len(wrong) - 1} other tensors",
            do="look for NaN or huge values in the data and in the model",
        )
    flat = {name: score.reshape(-1) for name, score in scores.items()}
    best = torch.cat([s.topk(min(count, len(s))).values.cpu() for s in flat.values()]).topk(count).values
    left, chosen = int((best == best[-1]).sum()), dict[str, Tensor]()
    for name, score in flat.items():
        equal = (score == best[-1]).nonzero()[:left, 0]
        left -= len(equal)
        indices = torch.cat([(score > best[-1]).nonzero()[:, 0], equal]).sort().values
        if len(indices):
            chosen[name] = indices.int() if len(score) < 2**31 else indices
    return chosen


def undecided(found: Iterable[Place], count: int) -> dict[str, Tensor]:
    """Return meta indices for `count` entries, for a dry run that saw no data: how many, not which."""
    chosen: dict[str, Tensor] = {}
    for place in found:
        if taken := min(count, place.size):
            chosen[place.label] = torch.empty(taken, dtype=torch.int32, device="meta")
            count -= taken
    return chosen


def place_entries(adapter: Adapter, sites: Iterable[Site], chosen: Mapping[str, Tensor]) -> None:
    """Place deltas on the entries that `chosen` (see `largest`) gives by a tensor's first label."""

    def entries(place: Place, init: Init) -> Entries | None:
        if place.label not in chosen:
            return None
        indices = checked(chosen[place.label], place.size, place.label)
        return Entries(init.zeros(len(indices)), indices)

    place_each(adapter, sites, entries)


def place_each(
    adapter: Adapter, sites: Iterable[Site], make: Callable[[Place, Init], Entries | None]
) -> None:
    """Place deltas made of what `make` returns for each tensor (a tied one once, where it is used first)."""
    made: dict[Any, Entries] = {}
    for site in sites:
        held: dict[str, Entries | Ref] = {}
        for place in places([site]):
            if place.key in made:
                held[place.name] = Ref(made[place.key])
            elif (change := make(place, adapter.init(site))) is not None:
                held[place.name] = made[place.key] = change
        if held:
            adapter.place(site, EntriesDelta(**held))


def checked(indices: Tensor, size: int, label: str) -> Tensor:
    """Return the indices if they are ascending places of a tensor of `size`: they may come from a file."""
    fits = indices.dim() == 1 and indices.dtype in (torch.int32, torch.int64)
    if fits and not indices.is_meta:
        fits = len(indices) > 0 and bool((indices.diff() > 0).all())
        fits = fits and int(indices[0]) >= 0 and int(indices[-1]) < size
    if not fits:
        raise ConfigError(
            "the chosen entries are no places of the tensor",
            saw=f"{label} of {size} entries: {indices.dtype} {tuple(indices.shape)}",
            do="calibrate anew, or get the checkpoint again from whoever saved it",
        )
    return indices
