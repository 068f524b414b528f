"""R06 to R08 and R32: what learns, what does not, how much of it there is, and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import inlay
from inlay import masks
from inlay.stack import State, need_state
from inlay.testing.cases import Case
from inlay.testing.effects import OPTIMIZERS, acting, backward, in_float64, output, stir, tensors_of, train
from inlay.testing.models import batch_for
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
    usually="a delta writes to the base in its forward, registers a base tensor as its own parameter, "
    "or a masked parameter is no part of the computation.",
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
    means="the mask names exactly the adapter's parameters; after a backward pass each masked tensor "
    "has a finite gradient, nothing else has one, and `check_training` agrees.",
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
    optimizer = OPTIMIZERS["AdamW"](inlay.parameter_groups(model))
    inlay.lifecycle(model, optimizer, 3)
    inlay.check_training(model, optimizer)
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


ASKED = 6  # tensors
STEP, RIGHT = 1e-5, 1e-5  # of the difference quotient; its error, by the gradient's norm


@rule(
    "R32",
    "Gradients are right",
    means="in float64 the gradient of each of some tensors, along itself and a random direction, is "
    "the central difference quotient of the loss, to 1e-5 of the gradient's size.",
    usually="something is detached, or a backward of the method's own is not the derivative of its forward.",
    dtypes=("float32",),
    share=0.34,
    families=("gpt2", "bert", "vit"),  # the others' norms compute in float32, in a float64 model too
    alone=True,
)
def gradients_are_right(case: Case) -> None:
    model = acting(case)
    model = in_float64(model)
    batch = batch_for(model, rows=2)

    def loss() -> Tensor:  # transformers' own computes in float32
        logits = model(**batch).logits
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
        found: Tensor = (logits.log_softmax(-1) * weights).sum(-1).mean() + inlay.auxiliary_loss(model)
        return found

    learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    loss().backward()  # type: ignore[no-untyped-call]
    floor = 1e-3 * max(float(p.grad.norm()) for _, p in learning if p.grad is not None)
    generator = torch.Generator().manual_seed(case.seed)
    for at in torch.randperm(len(learning), generator=generator)[:ASKED].tolist():
        name, tensor = learning[at]
        need(tensor.grad is not None, f"{name} has no gradient")
        off = _gradient_error(loss, tensor, floor, generator)
        need(off <= RIGHT, f"the gradient of {name} is {off:.1e} of its size off the difference quotient")


def _gradient_error(
    loss: Callable[[], Tensor], tensor: Tensor, floor: float, generator: torch.Generator
) -> float:
    """Return |quotient − gradient| along the gradient and a random direction, by the gradient's norm."""
    assert tensor.grad is not None
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    size = max(float(tensor.grad.norm()), floor)  # beside the others', rounding may be all of it
    way = tensor.grad / size + noise / noise.norm()
    return abs(_quotient(loss, tensor, STEP * way) / STEP - float((tensor.grad * way).sum())) / size


def _quotient(loss: Callable[[], Tensor], tensor: Tensor, way: Tensor) -> float:
    """Return (L(θ + v) − L(θ − v)) / 2, θ left as it was."""
    kept, found = tensor.detach().clone(), []
    with torch.no_grad():
        for sign in (1, -1):
            tensor.copy_(kept + sign * way)
            found.append(float(loss()))
        tensor.copy_(kept)
    return (found[0] - found[1]) / 2
