"""R09 to R14: folding into the base's weights, and what is undefined while folded."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import inlay
from inlay.errors import CannotMerge, MergedError, StateError
from inlay.hosts import Host
from inlay.stack import need_state, state_of
from inlay.testing.cases import NAME, Case
from inlay.testing.effects import LEAST, MOST, distance, in_float64, output, output_of, same_output, stir
from inlay.testing.models import batch_for
from inlay.testing.rule import RuleBroken, need, raises, rule
from inlay.testing.rules.attaching import no_trace
from inlay.testing.rules.files import reloaded
from inlay.testing.snapshots import differences, snapshot

TOLERANCE = 1e-4


def stirred(case: Case) -> nn.Module:
    """Return a model whose stack changes the output, the parts that merge by 5 % to 100 %."""
    model = case.attached()
    stir(model, case, merging=bool(case.merging()))
    return model


def merge(model: nn.Module, parts: Sequence[str], *, undo: bool = True) -> bool:
    """Merge `parts`; return False where that is rightly refused, the model untouched.

    Only a part above one that stays, on the same module, may be refused.
    """
    before, shown = snapshot(model), output(model)
    try:
        inlay.merge(model, list(parts), undo=undo)
    except CannotMerge:
        if not _stands_above(model, parts):
            raise
        no_trace(before, model, "a refused merge")
        same_output(shown, output(model), "a refused merge")
        return False
    return True


def _stands_above(model: nn.Module, parts: Sequence[str]) -> bool:
    """Whether one of `parts` acts on a module on which another part, that stays, acts below it."""
    left: set[int] = set()
    for placed in need_state(model).placed.values():
        here = {id(site.module) for site, _ in placed.adapter.placed}
        if placed.path not in parts:
            left |= here
        elif left & here:
            return True
    return False


@rule(
    "R09",
    "The merged model is the adapted one",
    means="in float32 ‖merged − adapted‖ is at most 1e-4 of the effect ‖adapted − base‖, the effect being"
    " 5 % to 100 % of the output, for the whole stack and for a part that can be folded by itself.",
    usually="the fold is not what forward does (scale, orientation, dropout, bias), or members fold in the "
    "wrong order.",
    dtypes=("float32",),
    concerns="merging",
)
def merges_exactly(case: Case) -> None:
    model = stirred(case)
    everything = [f"{NAME}/{m.name}" for m in case.members]
    adapted, norm = output(model), float(output_of(model).double().norm())
    merging = case.merging()
    alone = [merging[case.seed % len(merging)]]
    for parts in [merging, alone] if len(merging) > 1 else [merging]:
        base = output_of(model, *(p for p in everything if p not in parts))
        effect = distance(adapted, base)
        if parts == merging:
            size = effect / float(base.double().norm())
            need(LEAST <= size <= MOST, f"the effect is {size:.2f} of the output, not {LEAST} to {MOST}")
        if not merge(model, parts):
            need(len(parts) < len(everything), "merging the whole stack was refused")
            continue
        error = distance(output(model), adapted)
        most = TOLERANCE * max(effect, 0.01 * norm)  # a part alone may be hidden by one above it
        need(error <= most, f"merging {parts}: error {error:.2e}, effect {effect:.2e}, output {norm:.2e}")
        inlay.unmerge(model)
        same_output(adapted, output(model), "unmerging")


@rule(
    "R10",
    "Merging in bfloat16 at most doubles the error",
    means="the merged bfloat16 model is at most twice as far from the same model in float64 as the "
    "unmerged one.",
    usually="the fold computes in bfloat16, or rounds more than once.",
    dtypes=("bfloat16",),
    concerns="merging",
)
def merges_in_bfloat16(case: Case) -> None:
    model = stirred(case)
    batch = batch_for(model, rows=24, length=12)
    exact = in_float64(model)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    truth = output(exact, wide)
    unmerged = distance(output(model, batch), truth)
    if not merge(model, case.merging()):
        return
    merged = distance(output(model, batch), truth)
    need(unmerged > 0, "the unmerged model has no rounding error: it does not compute in bfloat16")
    need(merged <= 2 * unmerged, f"merged {merged:.2e} from float64, unmerged {unmerged:.2e}")


@rule(
    "R11",
    "Unmerging restores every bit",
    means="merge and unmerge, twice, give back the same objects, bits and flags, and the adapters act as "
    "before.",
    usually="a fold changes its arguments in place, or touches the adapter's own tensors.",
    concerns="merging",
)
def unmerges_exactly(case: Case) -> None:
    model = stirred(case)
    before, shown = snapshot(model), output(model)
    for _ in range(2):
        if not merge(model, case.merging()):
            return
        need(differences(before, model), "merging changed no tensor")
        inlay.unmerge(model)
        no_trace(before, model, "merge and unmerge")
        same_output(shown, output(model), "merge and unmerge")
    raises(StateError, lambda: inlay.unmerge(model), "unmerge with nothing merged")


@rule(
    "R12",
    "Merged for good, the model is plain",
    means="after merge(undo=False) of the whole stack the model has its original classes, attributes and "
    "keys, and saves and loads by torch and transformers alone.",
    usually="folding makes a tensor the architecture has no place for (a bias on a layer without one).",
    concerns="merging",
)
def becomes_plain(case: Case) -> None:
    model = case.model()
    before, kind = snapshot(model), type(model)
    case.attach(model)
    stir(model, case, merging=True)
    adapted, base = output(model), output_of(model, *case.lasting())
    if not merge(model, case.merging(), undo=False):
        return
    merged = output(model)
    most = TOLERANCE if case.dtype == torch.float32 else 0.3
    effect = distance(adapted, base)
    need(
        distance(merged, adapted) <= most * effect,
        f"error {distance(merged, adapted) / effect:.1e} of the effect",
    )
    if case.lasting():
        need(
            [p.path for p in need_state(model).placed.values()] == case.lasting(),
            "not just the folded parts are gone",
        )
        return
    need(type(model) is kind and state_of(model) is None, "the model keeps a class or a state of ours")
    need(not any(isinstance(m, Host) for m in model.modules()), "a module keeps a class of ours")
    biased = any(m.joined.adds_biases for m in case.members)
    found = [
        d
        for d in differences(before, model, values=False)
        if not (biased and ("bias" in d or "state_dict" in d))
    ]
    need(not found, f"the merged model is not plain: {'; '.join(found[:4])} ({len(found)} in all)")
    if biased:
        same_output(merged, output(copy.deepcopy(model)), "deepcopy")
    else:
        _travels(case, model, kind, merged)


def _travels(case: Case, model: nn.Module, kind: type, shown: Tensor) -> None:
    fresh = case.model()
    fresh.load_state_dict(model.state_dict())
    same_output(shown, output(fresh), "loading the state_dict into a fresh model")
    if case.dtype != torch.float32:
        return  # .to(bfloat16) also rounds rotary frequencies, which from_pretrained computes anew
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        same_output(shown, output(reloaded(kind, folder)), "save_pretrained and from_pretrained")


@rule(
    "R13",
    "What is undefined while merged is refused",
    means="while parts are merged, attach, load, merge, combine, training, advance and choosing stacks "
    "without them raise MergedError, and leave the model merged as it was; what is saved is saved "
    "as if unmerged.",
    usually="an operation of core forgets to ask; a method that folds needs nothing of its own.",
    dtypes=("float32",),
    concerns="merging",
)
def refused_while_merged(case: Case) -> None:
    model = stirred(case)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as second:
        digest = inlay.save(model, folder)
        if not merge(model, case.merging()):
            return
        before, shown = snapshot(model), output(model)
        without = [f"{NAME}/{m.name}" for m in case.members if f"{NAME}/{m.name}" not in case.merging()[:1]]
        optimizer = torch.optim.SGD([torch.zeros(1)])
        for what, forbidden in {
            "attach": lambda: case.attach(model, "de"),
            "load": lambda: inlay.load(model, folder, "de"),
            "merge": lambda: inlay.merge(model),
            "combine": lambda: inlay.combine(model, {NAME: 1.0}, name="mix"),
            "set_trainable": lambda: inlay.set_trainable(model, NAME),
            "parameter_groups": lambda: inlay.parameter_groups(model),
            "lifecycle": lambda: inlay.lifecycle(model, optimizer),
            "check_training": lambda: inlay.check_training(model),
            "advance": lambda: inlay.advance(model, NAME),
            "use of the bare base": lambda: inlay.use(model),
            "use without a merged part": lambda: inlay.use(model, *without),
            "route with a bare row": lambda: inlay.route(model, [NAME, None]),
        }.items():
            raises(MergedError, forbidden, f"{what} while merged")
        no_trace(before, model, "refused operations")
        same_output(shown, output(model), "refused operations")
        same_output(shown, output_of(model, NAME), "use with all merged parts")
        need(
            inlay.save(model, second) == digest, "a merged adapter saves something else than an unmerged one"
        )
        model.save_pretrained(second)  # type: ignore[operator]
        plain = output(reloaded(type(case.model()), second))
    same_output(output(case.model()), plain, "save_pretrained while merged, and from_pretrained")


@rule(
    "R14",
    "What cannot merge says so",
    means="merging a part without weight form raises CannotMerge, naming part and way out, the model "
    "untouched.",
    usually="the delta inherits a fold that does nothing, or fold fails half-way instead of `folds` being "
    "false.",
    concerns="lasting",
)
def refuses_to_merge(case: Case) -> None:
    lasting = case.lasting()
    if not lasting:
        raise RuleBroken("it declares merges = False, and every configuration drawn merges")
    model = stirred(case)
    before, shown = snapshot(model), output(model)
    for parts, undo in ((None, True), (lasting, False)):
        error = raises(CannotMerge, lambda p=parts, u=undo: inlay.merge(model, p, undo=u), "merging")  # type: ignore[misc]
        ways = ("parts=[", "keep", "merge both")
        need(any(way in str(error) for way in ways), f"the message names no way out: {error}")
        no_trace(before, model, "a refused merge")
        same_output(shown, output(model), "a refused merge")
