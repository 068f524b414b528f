"""Gradient checkpointing, both kinds: the gradients are those of a run without it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, lively, shake

pytest.importorskip("transformers")

LORA, IA3, SERIAL = "lora(rank=4, dropout=0.2)", "ia3()", "serial_adapter(rank=8)"
PREFIX = "prefix_tuning(length=3, hidden=16)"  # its generator runs in `prepare`, outside the blocks
STACKS = {
    "lora": LORA,
    "ia3": IA3,
    "serial": SERIAL,
    "prefix": PREFIX,
    "all": f"{LORA} + {PREFIX} + {IA3} + {SERIAL}",
}
BASE_DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.1},
    "gpt2": {},  # these have dropout by default
    "bert": {},
    "t5": {},
}
QUERY = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query", "t5": "q"}
KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
CLOSE = 1e-5  # ‖difference‖ / ‖gradient‖; float32

Gradients = dict[str, Tensor]


def adapted(family: str, *stacks: str) -> nn.Module:
    """Return a lively model in training mode with each of `stacks` attached as a, b, …, all acting."""
    model = lively(family, **BASE_DROPOUT[family])
    for name, stack in zip("abcdef", stacks, strict=False):
        inlay.attach(model, stack, name=name)
    shake(model)
    return model.train()


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    torch.manual_seed(7)  # the same dropout in every run
    loss: Tensor = model(**batch, **({} if "pixel_values" in batch else {"use_cache": False})).loss
    return loss


def gradients(
    model: nn.Module, batch: dict[str, Any], *, backward: Callable[[Tensor], Any] = Tensor.backward
) -> Gradients:
    """Return the gradient of every trainable tensor; each must have one."""
    model.zero_grad()
    backward(loss_of(model, batch))
    return collected(model)


def collected(model: nn.Module) -> Gradients:
    named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert named
    assert [n for n, g in named.items() if g is None] == []
    return {n: g.clone() for n, g in named.items() if g is not None}


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})


@contextmanager
def counted(model: nn.Module, family: str) -> Iterator[list[int]]:
    """Count how often the attention projections run, to see that blocks really are computed again."""
    runs: list[int] = []
    chosen = [m for n, m in model.named_modules() if n.endswith("." + QUERY[family])]
    hooks = [m.register_forward_hook(lambda *_: runs.append(1)) for m in chosen]
    try:
        yield runs
        assert len(runs) == 2 * len(chosen)
    finally:
        for hook in hooks:
            hook.remove()


def equal(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    whole = torch.cat([expected[n].flatten() for n in expected])
    assert distance(torch.cat([found[n].flatten() for n in expected]), whole) < CLOSE
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= CLOSE * max(
            float(gradient.norm()), 1e-3 * float(whole.norm())
        ), name


@KINDS
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("family", list(QUERY))
def test_gradients_equal_those_without(family: str, stack: str, reentrant: bool) -> None:
    model = adapted(family, STACKS[stack])
    batch = batch_for(model, labels=True)
    expected = gradients(model, batch)
    checkpoint(model, reentrant)
    with counted(model, family):
        equal(gradients(model, batch), expected)


@KINDS
def test_checkpointing_may_be_enabled_before_attaching(reentrant: bool) -> None:
    plain, model = adapted("llama", STACKS["all"]), lively("llama", **BASE_DROPOUT["llama"])
    checkpoint(model, reentrant)
    inlay.attach(model, STACKS["all"], name="a")
    shake(model)
    batch = batch_for(model, labels=True)
    with counted(model.train(), "llama"):
        found = gradients(model, batch)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        b.data.copy_(a.data)
    equal(found, gradients(plain, batch))


@KINDS
def test_the_first_block_learns_over_frozen_embeddings(reentrant: bool) -> None:
    """A reentrant checkpoint drops the graph of a block none of whose inputs requires a gradient."""
    model = adapted("llama", "lora(rank=4, targets=['query'])")
    checkpoint(model, reentrant)
    found = gradients(model, batch_for(model, labels=True))
    first = {n: g for n, g in found.items() if ".layers.0." in n}
    assert len(first) == 2
    assert all(float(g.norm()) > 1e-4 for g in first.values())


def routed(model: nn.Module) -> Any:
    return inlay.route(model, ["a", "b", None])


@KINDS
@pytest.mark.parametrize("family", list(QUERY))
def test_a_routed_batch_gets_its_gradients_after_the_route_ended(family: str, reentrant: bool) -> None:
    """Blocks are computed again under the route of their own forward, not under what holds by then."""
    model = adapted(family, f"{PREFIX} + {LORA}", f"{SERIAL} + {IA3}")
    batch = batch_for(model, labels=True)
    with routed(model):
        expected = gradients(model, batch)
    checkpoint(model, reentrant)
    model.zero_grad()
    with counted(model, family):
        with routed(model):
            loss = loss_of(model, batch)
        loss.backward()
        equal(collected(model), expected)
    assert model._inlay_state.slot.taps == {}, "tensors of the last block are held until the next call"


@KINDS
@pytest.mark.parametrize("first", [None, "a", "b"])
def test_backward_inside_another_choice_of_adapters(first: str | None, reentrant: bool) -> None:
    """The forward ran under one choice (or the model's own), the backward runs inside another."""
    model = adapted("llama", LORA, LORA)
    batch = batch_for(model, labels=True)

    def forward() -> Tensor:
        if first is None:
            return loss_of(model, batch)
        with inlay.use(model, first):
            return loss_of(model, batch)

    forward().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    checkpoint(model, reentrant)
    model.zero_grad()
    with counted(model, "llama"):
        loss = forward()
        with inlay.use(model):
            loss.backward()
    equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


def in_a_thread(loss: Tensor) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            loss.backward()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []


@KINDS
@pytest.mark.parametrize("way", ["active", "routed"])
def test_backward_in_a_second_thread(way: str, reentrant: bool) -> None:
    """On CUDA autograd's backward runs in a thread of its own, which knows nothing of this one's route."""
    model = adapted("llama", f"{PREFIX} + {LORA}", f"{SERIAL} + {IA3}")
    batch = batch_for(model, labels=True)

    def forward() -> Tensor:
        if way == "active":
            return loss_of(model, batch)
        with routed(model):
            return loss_of(model, batch)

    forward().backward()
    expected = collected(model)
    checkpoint(model, reentrant)
    model.zero_grad()
    with counted(model, "llama"):
        in_a_thread(forward())
    equal(collected(model), expected)


@KINDS
def test_detaching_leaves_the_checkpointing_function_of_the_user(reentrant: bool) -> None:
    model = lively("llama")
    checkpoint(model, reentrant)
    before = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    inlay.attach(model, LORA)
    gradients(model.train(), batch_for(model, labels=True))
    inlay.detach(model)
    after = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert len(before) > 0
