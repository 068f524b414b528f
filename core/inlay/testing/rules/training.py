"""R06 to R08: what learns, what does not, and how much of it there is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import inlay
from inlay import masks
from inlay.stack import State, need_state
from inlay.testing.cases import Case
from inlay.testing.effects import OPTIMIZERS, backward, output, stir, tensors_of, train
from inlay.testing.rule import need, rule
from inlay.testing.snapshots import digest, same_bits

COARSE = 0.05  # a learning rate whose AdamW steps bfloat16 does not round away


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a plain model, the objects themselves."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def learning_names(state: State) -> set[str]:
    """Return "path:name" of every tensor the masks let learn."""
    return {f"{p.path}:{n}" for p in state.placed.values() for n, on in masks.mask_of(p).items() if on}


@rule(
    "R06",
    "Only the adapter's own tensors change",
    means="under AdamW with decay and momentum, SGD with momentum, and Adafactor, given the adapter's "
    "groups or the whole model, every base tensor keeps its bits and every masked tensor moves.",
    usually="a delta writes to the base in its forward, registers a base tensor as its own parameter, or a "
    "masked parameter is no part of the computation.",
)
def only_own_tensors_change(case: Case) -> None:
    chosen = list(OPTIMIZERS) if len(case.members) == 1 else [list(OPTIMIZERS)[case.seed % 3]]
    for kind in chosen:
        model = case.model()
        base = base_tensors(model)
        before = digest(base)
        case.attach(model)
        stir(model, case)
        started, state = tensors_of(model), need_state(model)
        train(model, kind, whole=case.seed % 2 == 0, lr=None if case.dtype == torch.float32 else COARSE)
        need(digest(base) == before, f"{kind} changed the base")
        changed = {k for k, t in tensors_of(model).items() if not same_bits(t, started[k])}
        masked = learning_names(state)
        need(changed <= masked, f"{kind} changed what the mask holds still: {sorted(changed - masked)[:1]}")
        must = masked if kind == "AdamW" and case.dtype == torch.float32 else set()
        moves = changed or (kind != "AdamW" and case.dtype != torch.float32)
        need(moves and must <= changed, f"{kind} did not move {sorted(must - changed)[:1] or 'anything'}")


@rule(
    "R07",
    "The mask is the truth",
    means="the mask names exactly the adapter's parameters; after a backward pass each masked tensor has "
    "a finite gradient, nothing else has one, and `check_training` agrees.",
    usually="a parameter is created but not used, used under no_grad, or the mask leaves a name out.",
)
def mask_is_true(case: Case) -> None:
    model = case.model()
    base = base_tensors(model)
    case.attach(model)
    state = need_state(model)
    masked = learning_names(state)
    own = {f"{p.path}:{n}": t for p, n, t in state.own_parameters()}
    need(masked, "nothing learns")
    need(not any(t.requires_grad for t in base.values()), "a base tensor requires a gradient")
    backward(model)
    wrong = [
        n for n, t in own.items() if t.requires_grad != (n in masked) or (t.grad is not None) != (n in masked)
    ]
    need(not wrong, f"flag or gradient of {wrong[:1]} is not what the mask says ({len(wrong)} in all)")
    need(not any(t.grad is not None for t in base.values()), "a base tensor got a gradient")
    need(
        all(bool(t.grad.isfinite().all()) for t in own.values() if t.grad is not None),
        "a gradient is not finite",
    )
    inlay.check_training(model, OPTIMIZERS["AdamW"](inlay.parameter_groups(model)))
    held = [id(p) for group in inlay.parameter_groups(model, lr=1e-3) for p in group["params"]]
    need(
        sorted(held) == sorted(id(own[n]) for n in masked),
        "the parameter groups are not the masked tensors, once each",
    )


@rule(
    "R08",
    "The parameter count is the documented one",
    means="the number of parameters on the given sites equals the expression the method documents; the "
    "dry run says the same without allocating.",
    usually="the expression forgets a bias or a shared part, or a tensor is registered twice.",
    dtypes=("float32",),
    share=2.0,
)
def counted(case: Case) -> None:
    model = case.model()
    planned = inlay.plan(model, case.stack)
    report = case.attach(model)
    output(model)
    placed = list(need_state(model).placed.values())
    for member, dry, real, part in zip(case.members, planned.parts, report.parts, placed, strict=True):
        found = sum(p.numel() for _, p in part.adapter.named_parameters())
        need(
            dry.parameters == real.parameters == found,
            f"{member.name}: planned {dry.parameters}, attached {found}",
        )
        if member.joined.parameters is not None:
            wanted = member.joined.parameters(member.method, part.adapter.sites)
            need(found == wanted, f"{member.name} has {found} parameters; its expression gives {wanted}")
    own = [p for _, _, p in need_state(model).own_parameters()]
    need(len({id(p) for p in own}) == len(own), "a tensor is registered twice")
