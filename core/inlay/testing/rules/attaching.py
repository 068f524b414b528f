"""R01 to R05: attaching changes nothing it should not, and detaching leaves no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import nn

import inlay
from inlay.errors import CannotMerge
from inlay.testing.cases import NAME, Case
from inlay.testing.effects import close, output, output_of, same_output, share, stir, tensors_of, train
from inlay.testing.failing import Failing, InjectedError
from inlay.testing.rule import need, raises, rule
from inlay.testing.snapshots import Snapshot, differences, same_bits, snapshot


def no_trace(before: Snapshot, model: nn.Module, after: str) -> None:
    """Raise unless the model is bit for bit what it was."""
    found = differences(before, model)
    need(
        not found, f"after {after} the model is not what it was: {'; '.join(found[:5])} ({len(found)} in all)"
    )


@rule(
    "R01",
    "The output is unchanged at the start",
    means="a freshly attached stack that says so leaves every logit as it was: not a bit differs, or only"
    " the rounding the method declares.",
    usually="a factor that should start at zero or one does not, a bias or dropout acts at the start, or "
    "the delta returns y + Δy where Δy was asked for.",
)
def starts_unchanged(case: Case) -> None:
    model = case.model()
    plain = output(model)
    case.attach(model)
    started = output(model)
    tolerance = sum(m.joined.start_tolerance for m in case.members)
    if not all(m.method.starts_as_identity for m in case.members):
        need(
            share(started, plain) > 0,
            "it declares starts_as_identity = False, and changes nothing at the start",
        )
    elif tolerance == 0.0:
        same_output(plain, started, "attaching")
    elif case.dtype == torch.float32:
        need(close(started, plain, tolerance), f"attaching changed the output by {share(started, plain):.1e}")


@rule(
    "R02",
    "Detaching leaves no trace",
    means="after attach and detach the model has the same modules, classes, attributes, hooks, parameter "
    "objects, bits, flags and state_dict as before, also after training and merging.",
    usually="inject or a delta writes to a base module, keeps a hook, or swaps a parameter for a copy.",
)
def leaves_no_trace(case: Case) -> None:
    model = case.model()
    before, plain = snapshot(model), output(model)
    for deed, do in _deeds(case).items():
        case.attach(model)
        do(model)
        inlay.detach(model)
        no_trace(before, model, f"attach, {deed}, detach")
    same_output(plain, output(model), "detaching")


def _deeds(case: Case) -> dict[str, Callable[[nn.Module], object]]:
    deeds: dict[str, Callable[[nn.Module], object]] = {
        "train": lambda model: train(model, "AdamW", steps=2),
        "run": lambda model: _run(model, case),
    }
    if case.merging():
        deeds["merge"] = lambda model: _merge(model, case)
    return deeds


def _run(model: nn.Module, case: Case) -> None:
    output(model)
    output_of(model, NAME)
    _detach_parts(model, case)


def _merge(model: nn.Module, case: Case) -> None:
    stir(model, case)
    with suppress(CannotMerge):  # above a part that stays; R09 checks which refusals are right
        inlay.merge(model, case.merging())


def _detach_parts(model: nn.Module, case: Case) -> None:
    """Take the parts off one by one, the last remaining one left to the caller."""
    order = case.members[:-1] if case.seed % 2 else case.members[:0:-1]
    for member in order:
        inlay.detach(model, f"{NAME}/{member.name}")
        output(model)


@rule(
    "R03",
    "A failure leaves no trace",
    means="whatever fails while attaching, at whichever site, the model is bit for bit what it was, with "
    "and without other adapters on it.",
    usually="a method changes the model or the adapters already there in inject, instead of placing deltas.",
)
def failing_leaves_no_trace(case: Case) -> None:
    model = case.model()
    _fail_on(model, case)
    case.attach(model, "other")
    stir(model, case, "other")
    _fail_on(model, case)
    inlay.detach(model, "other")


def _fail_on(model: nn.Module, case: Case) -> None:
    before, shown = snapshot(model), output(model)
    victim = case.seed % len(case.members)
    for at in ("inject", "place", "mask"):
        chosen = case.members[victim]
        failing = Failing(
            inner=chosen.method,
            at=at,
            k=case.seed % 5,
            targets=chosen.method.targets,
            layers=chosen.method.layers,
        )
        stack = (
            *case.members[:victim],
            dataclasses.replace(chosen, method=failing),
            *case.members[victim + 1 :],
        )
        trial = dataclasses.replace(case, members=stack)
        raises(InjectedError, partial(trial.attach, model), f"attaching a method that fails at {at}")
        no_trace(before, model, f"a failure at {at}")
    same_output(shown, output(model), "a failed attach")


@rule(
    "R04",
    "Inactive adapters do nothing",
    means="inside `use(model)` the model gives the base's very bits; leaving the block, or an error in "
    "it, brings the adapters back; no flag of any parameter moves.",
    usually="a delta runs outside core's programs (a hook, a patched forward), or keeps state between calls.",
)
def inactive_is_base(case: Case) -> None:
    model = case.model()
    plain = output(model)
    case.attach(model)
    stir(model, case)
    adapted, before = output(model), snapshot(model)
    same_output(plain, output_of(model), "use(model)")
    same_output(adapted, output_of(model, NAME), "use(model, name)")
    try:
        with inlay.use(model):
            no_trace(before, model, "entering use(model)")
            same_output(adapted, output_of(model, NAME), "use inside use")
            same_output(plain, output(model), "leaving an inner use")
            raise InjectedError
    except InjectedError:
        pass
    same_output(adapted, output(model), "leaving use(model)")
    inlay.detach(model)
    case.attach(model, activate=False)
    same_output(plain, output(model), "attach(activate=False)")
    need(share(adapted, plain) > 0, "the adapters have no effect")


@rule(
    "R05",
    "One seed gives the same weights",
    means="attaching twice with one seed gives bit-identical tensors, whatever torch's own generator "
    "holds, and draws nothing from it.",
    usually="a tensor is made with torch.randn, nn.init or nn.Linear instead of with `init`.",
)
def seeded(case: Case) -> None:
    found = []
    for noise in (1, 2):
        model = case.model()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise)
            state = torch.get_rng_state()
            case.attach(model, seed=case.seed)
            need(torch.equal(state, torch.get_rng_state()), "attach(seed=...) drew from torch's generator")
        found.append(tensors_of(model))
    need(found[0], "the adapter has no tensors")
    need(found[0].keys() == found[1].keys(), "two attachments have different tensors")
    wrong = [key for key, tensor in found[0].items() if not same_bits(tensor, found[1][key])]
    need(not wrong, f"one seed gave two different {wrong[:1]} ({len(wrong)} in all)")
