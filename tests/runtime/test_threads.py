"""Threads sharing one model: each thread's `use` and `route` are its own."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, lively, shake

pytest.importorskip("transformers")

STACKS = {
    "a": "lora(rank=4)",
    "b": "prefix_tuning(length=3, hidden=16)",
    "c": "serial_adapter(rank=8) + ia3()",
    "d": "ia3() + lora(rank=2) + prefix_tuning(length=2, hidden=16)",
}
ROUTES: list[Any] = [
    ["a", "b", None],
    ["b", "c", "d"],
    "c",
    ["d", "d", "a"],
    None,
    [("a", "b"), "c", "a"],
    "d",
    "b",
]
ROUNDS = 15
CLOSE = 1e-5


def adapted(family: str) -> nn.Module:
    model = lively(family)
    for name, stack in STACKS.items():
        inlay.attach(model, stack, name=name)
    shake(model)
    return model


def all_at_once(jobs: list[Callable[[], None]]) -> None:
    """Run each job in a thread of its own, started together; raise what one of them raised."""
    start, failures = threading.Barrier(len(jobs)), []

    def run(job: Callable[[], None]) -> None:
        try:
            start.wait(timeout=60)
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if failures:
        raise failures[0]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_eight_threads_get_their_own_routes(family: str) -> None:
    model = adapted(family)
    batches = [batch_for(model, seed=i) for i in range(len(ROUTES))]

    def logits(i: int) -> Tensor:
        with torch.no_grad(), inlay.route(model, ROUTES[i]):
            return model(**batches[i]).logits

    expected = [logits(i) for i in range(len(ROUTES))]
    with torch.no_grad():
        active = [model(**batch).logits for batch in batches]
    assert all(distance(a, b) > 0.05 for a, b in zip(expected, active, strict=True))

    def job(i: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(ROUNDS):
                assert torch.equal(logits(i), expected[i])

        return run

    all_at_once([job(i) for i in range(len(ROUTES))])


def test_threads_train_through_their_own_routes() -> None:
    """Gradients of the threads' losses, each under its route, are those of the same losses in turn."""
    model = adapted("llama").train()
    batches = [batch_for(model, seed=i, labels=True) for i in range(len(ROUTES))]
    routes = [route for route in ROUTES if route is not None]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(i: int) -> list[Tensor | None]:
        with inlay.route(model, routes[i]):
            loss = model(**batches[i]).loss
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    expected = [gradients(i) for i in range(len(routes))]
    found: dict[int, list[Tensor | None]] = {}
    all_at_once([lambda i=i: found.update({i: gradients(i)}) for i in range(len(routes))])  # type: ignore[misc]
    for i, one in enumerate(expected):
        assert [g is None for g in found[i]] == [g is None for g in one]
        pairs = [(a, b) for a, b in zip(found[i], one, strict=True) if a is not None and b is not None]
        assert len(pairs) > 0
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


def test_use_in_one_thread_is_invisible_in_another() -> None:
    model = adapted("llama")
    batch = batch_for(model)
    seen: dict[str, Tensor] = {}

    def look(where: str) -> None:
        with torch.no_grad():
            seen[where] = model(**batch).logits

    look("before")
    with inlay.use(model):
        look("inside")
        all_at_once([lambda: look("other")])
        with inlay.use(model, "a"):
            look("nested")
            all_at_once([lambda: look("other, nested")])
        look("inside again")
    look("after")
    assert torch.equal(seen["other"], seen["before"])
    assert torch.equal(seen["other, nested"], seen["before"])
    assert torch.equal(seen["after"], seen["before"])
    assert torch.equal(seen["inside again"], seen["inside"])
    assert distance(seen["inside"], seen["before"]) > 0.05
    assert distance(seen["nested"], seen["inside"]) > 0.05


def test_more_routes_at_once_than_are_kept_compiled() -> None:
    """Threads throw each other's compiled routes out of the cache; nobody notices."""
    model = lively("llama", num_hidden_layers=1)
    names = [f"n{i}" for i in range(9)]  # 255 choices of up to four of them; 64 are kept
    for name in names:
        inlay.attach(model, "lora(rank=1, targets=['query'])", name=name)
    shake(model)
    batch = batch_for(model, rows=4)
    alone: dict[Any, Tensor] = {}
    with torch.no_grad():
        for name in names:
            with inlay.use(model, name):
                alone[name] = model(**batch).logits

    def job(seed: int) -> None:
        draw = random.Random(seed)
        for turn in range(200):
            chosen = [draw.choice(names) for _ in range(4)]
            route = inlay.route(model, chosen)
            if turn % 25 == 0:
                with torch.no_grad(), route:
                    logits = model(**batch).logits
                assert distance(logits, torch.stack([alone[n][row] for row, n in enumerate(chosen)])) < CLOSE

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        all_at_once([lambda seed=seed: job(seed) for seed in range(8)])  # type: ignore[misc]
    finally:
        sys.setswitchinterval(interval)


def test_a_thread_may_generate_while_others_do() -> None:
    """What is kept for one generation belongs to its cache, not to the model."""
    model, rows = adapted("llama"), [["b", "d"], ["d", "b"], ["b", None], [None, "d"]]
    model.generation_config.eos_token_id = None
    ids = batch_for(model, rows=2)["input_ids"]

    def generate(i: int) -> Tensor:
        with inlay.route(model, rows[i]):
            return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)

    expected = [generate(i) for i in range(len(rows))]
    assert not torch.equal(expected[0], expected[1])
    found: dict[int, Tensor] = {}
    all_at_once([lambda i=i: found.update({i: generate(i)}) for i in range(len(rows))])  # type: ignore[misc]
    assert all(torch.equal(found[i], tokens) for i, tokens in enumerate(expected))
