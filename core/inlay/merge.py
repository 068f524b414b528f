"""Merging: folding deltas into the base's weights, measured, undone bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.attach import refused_while_merged, remove
from inlay.backends import backend_of
from inlay.compile import Entry, inside_out, members_of
from inlay.delta import Fold
from inlay.errors import CannotMerge, ConfigError, MergedError, RegistryError, StateError, shown
from inlay.masks import apply as apply_masks
from inlay.programs import Onion
from inlay.registry import registry
from inlay.sites import ModuleSite
from inlay.stack import Placed, State, need_state
from inlay.thaw import WAYS, Thawed, leave_out
from inlay.weights import as_stored, read
from inlay.writing import Undo, check_can_write, write

PROBES = 16


@dataclass(frozen=True)
class MergedSite:
    """What folding did at one site: ‖ΔW‖, the measured error of the folded layer against the adapted
    one as a share of the effect (None where the site has no linear probe), and what storing cost as a
    share of ΔW and of W: the rounding of the weight's dtype, or of the few bits it went back into.
    `quantised` says what became of a quantised layer."""

    site: str
    parts: tuple[str, ...]
    change: float
    error: float | None
    rounding: float
    noise: float = 0.0
    quantised: str | None = None


@dataclass
class MergeReport:
    """The certificate of a merge, site by site."""

    sites: list[MergedSite] = field(default_factory=list)
    kept_bytes: int = 0

    @property
    def worst(self) -> float:
        return max((s.error for s in self.sites if s.error is not None), default=0.0)

    def __str__(self) -> str:
        parts = sorted({p for s in self.sites for p in s.parts})
        return (
            f"merged {', '.join(parts)} at {len(self.sites)} sites; largest error {self.worst:.1e} of the "
            f"effect; {self.kept_bytes:,} bytes kept for unmerge{self._of_quantised()}"
        )

    def _of_quantised(self) -> str:
        layers = [site for site in self.sites if site.quantised]
        if not layers:
            return ""
        rounding, noise = max(s.rounding for s in layers), max(s.noise for s in layers)
        return (
            f"; {len(layers)} sites in quantised layers, {layers[0].quantised}d, at a cost of up to "
            f"{rounding:.1e} of the change and {noise:.1e} of the weight"
        )


def merge(
    model: nn.Module,
    parts: Sequence[str] | None = None,
    *,
    undo: bool = True,
    tolerance: float = 1e-3,
    quantised: str | None = None,
) -> MergeReport:
    """Fold active adapters into the base's weights; return a certificate of what it did.

    `parts` names adapters or parts (default: all that are active). With `undo` a copy of each
    changed tensor is kept, and `unmerge` restores it bit for bit; without, the folded parts are
    gone afterwards and a model without other adapters is plain again.

    A quantised layer is merged into only if `quantised` says how: "dequantise" makes it a plain linear
    layer in the dtype around it; "requantise" writes the merged weight back in the layer's own few
    bits, and the report says what that costs (`rounding`: more than 1 means that it cost more than the
    whole change). `unmerge` gives the very same quantised layers back.

    Raises `CannotMerge`, the model untouched, where a part has no weight form, a member below it
    stays unmerged and does not commute with it, a storage is shared with another use, the layer
    is quantised, or a site's measured error is above `tolerance` of the effect.
    """
    state = need_state(model)
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
        raise ConfigError(
            "this cannot be a tolerance",
            saw=f"tolerance={shown(tolerance)}",
            do="give a share of the effect, such as 1e-3",
        )
    if quantised not in (None, *WAYS):
        raise ConfigError(
            "quantised layers cannot be merged into that way",
            saw=f"quantised={shown(quantised)}",
            do='give "dequantise", "requantise", or leave it out',
        )
    if any(p.merged for p in state.placed.values()):
        raise refused_while_merged(state, "merge")
    chosen = _chosen(state, parts)
    for placed in chosen:
        placed.adapter.recall()
    folds = {p.id: registry.call("merge", p.method, adapter=p.adapter) for p in chosen}
    modules = _entries_by_module(state)
    for entries in modules.values():
        _check_order(entries, {p.id for p in chosen})
    report = MergeReport()
    kept = Undo()
    try:
        for entries in modules.values():
            report.sites += _merge_module(state, entries, folds, tolerance, quantised, kept)
    except BaseException:
        kept.put_back()
        raise
    for placed in chosen:
        placed.merged = True
    if undo:
        state.merge_undo = kept
        report.kept_bytes = kept.bytes
        apply_masks(state)
        state.activate()
    else:
        remove(state, chosen)
        if quantised == "dequantise":
            leave_out(model, [name for name, module in model.named_modules() if module in kept.layers])
    return report


def unmerge(model: nn.Module) -> None:
    """Restore every merged weight to the very bits it had; the adapters act again."""
    state = need_state(model)
    if not state.merge_undo:
        raise StateError(
            "nothing is merged", saw="no kept weights", do="merge with undo=True to be able to undo"
        )
    state.merge_undo.put_back()
    state.merge_undo = None
    for placed in state.placed.values():
        placed.merged = False
    apply_masks(state)
    state.activate()


def _chosen(state: State, parts: Sequence[str] | None) -> list[Placed]:
    if isinstance(parts, str):
        parts = [parts]
    active = [state.placed[i] for i in state.active]
    chosen = active if parts is None else state.find_all(parts)
    idle = [p.path for p in chosen if p.id not in state.active]
    if idle or not chosen:
        raise CannotMerge(
            "only active adapters can be merged",
            saw=f"not active: {', '.join(idle) or 'any'}",
            do="attach it active, or load it with activate=True",
        )
    return sorted(chosen, key=lambda p: state.active.index(p.id))


def _entries_by_module(state: State) -> dict[int, list[Entry]]:
    """Return the active entries of each leaf module, in stack order."""
    modules: dict[int, list[Entry]] = {}
    for number in state.active:
        placed = state.placed[number]
        for site, delta in placed.adapter.placed:
            modules.setdefault(id(site.module), []).append((placed, site, delta))
    return {key: inside_out(entries) for key, entries in modules.items()}


def _check_order(entries: Sequence[Entry], chosen: set[int]) -> None:
    """A member folds if all below it are folded, or it and those left below are functions of x alone."""
    left: list[Entry] = []
    for entry in entries:
        placed, site, delta = entry
        if placed.id not in chosen:
            left.append(entry)
            continue
        for below in left:
            if not (delta.additive and below[2].additive):
                raise CannotMerge(
                    f"{placed.path!r} cannot be merged over {below[0].path!r}, which stays",
                    saw=f"at {site.name} they do not commute",
                    do=f"merge both, or stack {placed.part_name!r} below {below[0].part_name!r}",
                )


def _merge_module(
    state: State,
    entries: Sequence[Entry],
    folds: dict[int, dict[ModuleSite, Fold]],
    tolerance: float,
    quantised: str | None,
    kept: Undo,
) -> list[MergedSite]:
    """Fold every chosen entry of one module: at each of its slices and experts, then written at once.

    What was there goes to `kept`.
    """
    sites: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry[0].id in folds:
            sites.setdefault(entry[1].name, []).append(entry)
    for held in _one_per_tensor(here[0][1] for here in sites.values()):
        check_can_write(state, held, quantised)
    layer = _thawed(next(iter(sites.values()))[0][1], kept) if sites else None
    changed: list[tuple[ModuleSite, Tensor, Tensor | None]] = []
    done: list[MergedSite] = []
    with torch.no_grad():
        for here in sites.values():
            site = here[0][1]
            assert isinstance(site, ModuleSite)
            weight, bias = read(site)
            folded = _folded(here, folds, weight, bias)
            error = _measured(state, here, (weight, bias), folded)
            _check_result(site, here, folded, error, tolerance)
            changed.append((site, *folded))
            parts, change = (
                tuple(dict.fromkeys(p.path for p, _, _ in here)),
                float((folded[0] - weight).norm()),
            )
            way = None if layer is None else quantised
            done.append(MergedSite(site.name, parts, change, error, 0.0, quantised=way))
        if changed:
            old = write(changed[0][0].module, as_stored(changed))
            kept.tensors += old if layer is None else []  # a quantised layer is put back as a whole
    if layer is not None:
        assert quantised is not None
        layer.settle(quantised)
    return [_stored_at(one, site, folded) for one, (site, folded, _) in zip(done, changed, strict=True)]


def _one_per_tensor(sites: Iterable[Any]) -> Iterable[ModuleSite]:
    """Return a site for each weight that some of a module's sites are parts of."""
    return {site.weight_name: site for site in sites}.values()


def _thawed(site: Any, kept: Undo) -> Thawed | None:
    """Make the site's layer a plain one, if it is quantised."""
    backend = backend_of(site.module)
    if backend is None:
        return None
    layer = Thawed(site.module, backend, site.reference.dtype)
    kept.layers[site.module] = layer.original
    layer.thaw()
    return layer


def _stored_at(merged: MergedSite, site: ModuleSite, folded: Tensor) -> MergedSite:
    """Return the record of a site with what storing its folded weight cost."""
    with torch.no_grad():
        lost, size = float((read(site)[0] - folded).norm()), float(folded.norm())
    if not lost < math.inf:
        raise CannotMerge(
            "the merged weight does not fit into the layer's own bits",
            saw=f"{', '.join(merged.parts)} at {site.name}: values that are not finite",
            do='merge(..., quantised="dequantise"), or check the adapter',
        )
    return replace(merged, rounding=lost / max(merged.change, 1e-30), noise=lost / max(size, 1e-30))


def _folded(
    here: Sequence[Entry], folds: dict[int, dict[ModuleSite, Fold]], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    done: set[int] = set()
    for placed, site, _ in here:
        if placed.id not in done:
            fold = next((f for s, f in folds[placed.id].items() if s.name == site.name), None)
            answer = None if fold is None else fold(weight, bias)
            if answer is None or not _alike(answer, (weight, bias)):
                raise RegistryError(
                    f"the fold of {placed.method.id!r} does not give a weight and bias of the layer's shape",
                    saw=f"at {site.name}: {'no fold' if fold is None else shown(answer)}",
                    do="answer merge with a fold (weight, bias) -> (weight, bias) for every site",
                )
            weight, bias = answer
            done.add(placed.id)
    return weight, bias


def _alike(answer: Any, tensors: tuple[Tensor, Tensor | None]) -> bool:
    """Whether a fold's answer can stand for (weight, bias); a bias may be new."""
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], Tensor):
        return False
    weight, bias = answer
    if tensors[1] is None:
        return weight.shape == tensors[0].shape and (bias is None or bias.dim() == 1)
    return weight.shape == tensors[0].shape and bias is not None and bias.shape == tensors[1].shape


def _measured(
    state: State,
    here: Sequence[Entry],
    base: tuple[Tensor, Tensor | None],
    folded: tuple[Tensor, Tensor | None],
) -> float | None:
    """Return ‖folded(x) − adapted(x)‖ / ‖adapted(x) − base(x)‖ on probes; deltas in their own dtype."""
    site = here[0][1]
    assert isinstance(site, ModuleSite)
    if not site.is_linear or any(d.face == "weight" for _, _, d in here):
        return None
    deltas = [d for _, _, d in here]
    modes = [d.training for d in deltas]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBES, site.in_features, generator=generator).to(
        base[0].device, site.reference.dtype
    )
    members = members_of(state, here)
    for member in members:
        member.part = None
    for delta in deltas:
        delta.eval()
    try:
        plain = _linear(probe, base)
        adapted = Onion(members, state.slot).run(lambda x: _linear(x, base), probe)
    finally:
        for delta, mode in zip(deltas, modes, strict=True):
            delta.train(mode)
    effect = (adapted - plain).norm()
    return 0.0 if effect == 0 else float((_linear(probe, folded) - adapted).norm() / effect)


def _linear(x: Tensor, tensors: tuple[Tensor, Tensor | None]) -> Tensor:
    return nn.functional.linear(x.to(tensors[0].dtype), *tensors)


def _check_result(
    site: ModuleSite,
    here: Sequence[Entry],
    folded: tuple[Tensor, Tensor | None],
    error: float | None,
    most: float,
) -> None:
    names = ", ".join(dict.fromkeys(p.path for p, _, _ in here))
    if not all(bool(t.isfinite().all()) for t in folded if t is not None):
        raise CannotMerge(
            "folding gives values that are not finite", saw=f"{names} at {site.name}", do="check the adapter"
        )
    # A delta that computes in bfloat16 differs from its float32 fold by its own rounding.
    most = max(most, 8 * torch.finfo(site.reference.dtype).eps)
    if error is not None and not error <= most:
        raise CannotMerge(
            "the folded layer does not do what the adapted one does",
            saw=f"{names} at {site.name}: error {error:.1e} of the effect, tolerance {most:.1e}",
            do="the method's fold is wrong, or its forward is not linear; keep it attached",
        )


__all__ = ["MergeReport", "MergedError", "MergedSite", "merge", "unmerge"]
