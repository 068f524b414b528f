"""Checks that every rehearsed method goes through: real models, whole calls, no mocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.authoring import Method, register
from inlay.registry import registry
from inlay.stack import Placed, need_state
from inlay.testing.models import batch_for, build
from inlay.testing.snapshots import differences, snapshot

Batch = dict[str, Any]


@contextmanager
def offered(*kinds: type[Method]) -> Iterator[None]:
    """Register methods for a while, as a notebook would."""
    for kind in kinds:
        register(kind)
    try:
        yield
    finally:
        for kind in kinds:
            registry.forget(kind)


def part(model: nn.Module, name: str) -> Placed:
    """Return the one part attached as `name`."""
    return need_state(model).find(name)[0]


def stir(model: nn.Module, name: str, *, seed: int = 1, std: float = 0.3) -> None:
    """Give every parameter of the adapter `name` new values, so that nothing is zero by its start."""
    generator = torch.Generator().manual_seed(seed)
    for placed in need_state(model).find(name):
        for _, parameter in placed.adapter.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            with torch.no_grad():
                parameter.add_(noise.to(parameter.dtype))


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


def gradients(model: nn.Module, batch: Batch, *, extra: bool = True) -> dict[str, Tensor]:
    """Return the gradient of every tensor that got one from the task loss (and the auxiliary losses)."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    (loss + inlay.auxiliary_loss(model) if extra else loss).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_gradients(model: nn.Module, name: str, batch: Batch) -> None:
    """Gradients reach exactly the adapter's trainable tensors, and none of them is all zero."""
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-3))
    got = gradients(model, batch)
    inlay.check_training(model, optimizer)
    names = {id(p): n for n, p in model.named_parameters()}
    wanted = {names[id(p)] for _, p in part(model, name).adapter.named_parameters() if p.requires_grad}
    assert wanted
    assert set(got) == wanted
    flat = [n for n, g in got.items() if not g.abs().sum() > 0]
    assert not flat, f"no gradient reaches {flat}"


def check_base_unmoved(model: nn.Module, batch: Batch) -> None:
    """A step of AdamW with weight decay leaves every tensor of the base as it was, bit for bit."""
    before = {n: t.clone() for n, t in model.state_dict().items() if "inlay." not in n}
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-2), weight_decay=0.1)
    gradients(model, batch)
    optimizer.step()
    after = model.state_dict()
    assert before
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def check_detach(model: nn.Module, attach: Callable[[], Any], batch: Batch, **route: Any) -> None:
    """Attaching, a call and detaching leave the model as it was, bit for bit."""
    before, plain = snapshot(model), logits(model, batch)
    attach()
    assert differences(before, model)
    with inlay.route(model, **route) if route else nullcontext():
        logits(model, batch)
    inlay.detach(model)
    assert differences(before, model) == []
    assert torch.equal(logits(model, batch), plain)


def check_routing(model: nn.Module, names: Sequence[str | None], batch: Batch, **route: Any) -> None:
    """A batch routed row by row equals each row alone under its own adapter."""
    with inlay.route(model, list(names), **route):
        together = logits(model, batch)
    tasks = route.get("tasks")
    alone = []
    for row, name in enumerate(names):
        own = {k: v[row : row + 1] for k, v in batch.items()}
        with inlay.route(model, name, tasks=None if tasks is None else [tasks[row]]):
            alone.append(logits(model, own))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert not all(torch.equal(alone[0], other) for other in alone[1:])


def check_round_trip(
    make: Callable[[], nn.Module], model: nn.Module, name: str, batch: Batch, folder: Path,
    prepare: Callable[[nn.Module], Any] = lambda fresh: None, **route: Any,
) -> nn.Module:  # fmt: skip
    """Saved and loaded onto a fresh base, the adapter gives the same logits and tensors, bit for bit."""
    inlay.save(model, folder, name)
    fresh = make()
    prepare(fresh)
    plain = logits(make(), batch)
    count = inlay.load(fresh, folder, name)
    assert count == len(part(model, name).adapter.tensors())
    with inlay.route(model, name, **route):
        wanted = logits(model, batch)
    with inlay.route(fresh, name, **route):
        assert torch.equal(logits(fresh, batch), wanted)
    assert not torch.equal(wanted, plain)
    ours, theirs = part(model, name).adapter.tensors(), part(fresh, name).adapter.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    return fresh


def check_checkpointing(model: nn.Module, batch: Batch, *, reentrant: bool, **route: Any) -> None:
    """Gradient checkpointing of either kind gives the gradients of the plain run.

    The route is left before backward, as a training loop does.
    """
    model.train()

    def run() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # dropout, too, must be what it was
            with inlay.route(model, **route) if route else nullcontext():
                loss = model(**batch).loss
            loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = run()
    model.gradient_checkpointing_disable()
    model.eval()
    assert plain.keys() == again.keys() != set()
    for key, gradient in plain.items():
        torch.testing.assert_close(
            again[key], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


def padded(model: nn.Module, lengths: Sequence[int], *, left: bool = True, seed: int = 0) -> Batch:
    """Return a batch of prompts of these lengths, padded, with its mask."""
    width = max(lengths)
    ids = batch_for(model, rows=len(lengths), length=width, seed=seed)["input_ids"]
    column = torch.arange(width).expand(len(lengths), -1)
    count = torch.tensor(lengths)[:, None]
    mask = (column >= width - count) if left else (column < count)
    return {"input_ids": torch.where(mask, ids, 0), "attention_mask": mask.long()}


def uncached(model: nn.Module, batch: Batch, steps: int) -> Tensor:
    """Return greedy continuations of left-padded prompts, each step from the whole sequence, no cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        step = logits(
            model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        )
        ids = torch.cat([ids, step[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids[:, -steps:]


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

__all__ = [
    "GREEDY", "Batch", "batch_for", "build", "check_base_unmoved", "check_checkpointing",
    "check_detach", "check_gradients", "check_round_trip", "check_routing", "gradients", "logits",
    "offered", "padded", "part", "stir", "uncached",
]  # fmt: skip
