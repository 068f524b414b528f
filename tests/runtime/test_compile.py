"""`torch.compile(fullgraph=True)` with inductor: stacks compile without a graph break and give the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, lively, shake

pytest.importorskip("transformers")

PREFIX = "prefix_tuning(length=3, hidden=16)"
STACK = f"lora(rank=4) + {PREFIX} + serial_adapter(rank=8)"
SMALL: dict[str, dict[str, Any]] = {"bert": {"num_hidden_layers": 1}, "llama": {"num_hidden_layers": 1}}
CLOSE = 1e-5  # ‖difference‖ / ‖logits‖, float32: inductor orders sums otherwise


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):  # each worker has one core
        yield
    torch._dynamo.reset()


def adapted(family: str, *stacks: str, train: tuple[str, ...] = ()) -> nn.Module:
    model = lively(family, **SMALL.get(family, {}))
    for name, stack in zip("abcdef", stacks, strict=False):
        inlay.attach(model, stack, name=name, train=train)
    shake(model)
    return model


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def acts(model: nn.Module, batch: dict[str, Any], adapted_logits: Tensor) -> bool:
    with inlay.use(model):
        return distance(adapted_logits, logits(model, batch)) > 0.05


def test_a_stack_with_a_trained_head_compiles_and_trains() -> None:
    """LoRA, a prefix with its generator, serial adapters with their norms, a head: one graph."""
    model = adapted("bert", STACK, train=("head",)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = batch_for(model, labels=True)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def step(called: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = called(**batch)
        out.loss.backward()
        return out.logits.detach(), {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}

    expected, gradients = step(model)
    assert gradients.keys() == parameters.keys()
    assert acts(model, batch, expected)
    found, compiled = step(torch.compile(model, fullgraph=True))
    assert distance(found, expected) < CLOSE
    assert compiled.keys() == gradients.keys()
    whole = torch.cat([g.flatten() for g in gradients.values()])
    assert distance(torch.cat([g.flatten() for g in compiled.values()]), whole) < 10 * CLOSE


def test_a_routed_batch_compiles() -> None:
    model = adapted("llama", f"lora(rank=4) + {PREFIX}", "serial_adapter(rank=8) + ia3()")
    batch = batch_for(model)
    compiled = torch.compile(model, fullgraph=True)
    with inlay.route(model, ["a", "b", None]):
        expected, found = logits(model, batch), logits(compiled, batch)
    assert distance(found, expected) < CLOSE
    assert acts(model, batch, expected)


# What follows is about tracing and its guards, whatever then writes the code.


@pytest.mark.slow
def test_every_choice_of_adapters_gets_a_graph_of_its_own() -> None:
    model = adapted("llama", f"lora(rank=4) + {PREFIX}", "serial_adapter(rank=8) + ia3()")
    batch = batch_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    seen = [logits(compiled, batch)]
    assert distance(seen[0], logits(model, batch)) < CLOSE
    choices = [inlay.use(model), inlay.use(model, "b"), inlay.route(model, ["a", "b", None])]
    for choice in choices:
        with choice:
            seen.append(logits(compiled, batch))
            assert distance(seen[-1], logits(model, batch)) < CLOSE
    assert all(distance(a, b) > 0.01 for i, a in enumerate(seen) for b in seen[:i])
    assert torch.equal(logits(compiled, batch), seen[0])


def test_a_changed_weight_acts_in_a_graph_made_before() -> None:
    model = adapted("bert", STACK, "dora(rank=2)", train=("head",))
    batch = batch_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = logits(compiled, batch)
    shake(model, seed=5)
    assert distance(logits(compiled, batch), logits(model, batch)) < CLOSE
    assert distance(logits(compiled, batch), before) > 0.01


def test_a_compiled_model_is_plain_again_after_detach() -> None:
    model = adapted("llama", STACK)
    batch = batch_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = logits(compiled, batch)
    inlay.detach(model)
    assert distance(logits(compiled, batch), logits(model, batch)) < CLOSE
    assert distance(logits(compiled, batch), before) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "t5", "mistral", "vit"])
def test_every_family_compiles(family: str) -> None:
    model = adapted(family, STACK)
    batch = batch_for(model)
    expected = logits(model, batch)
    assert distance(logits(torch.compile(model, fullgraph=True), batch), expected) < CLOSE
    assert acts(model, batch, expected)


@pytest.mark.slow
def test_one_graph_serves_batches_of_every_size() -> None:
    model = adapted("llama", STACK)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows, length in ((2, 5), (3, 7), (5, 11)):
        batch = batch_for(model, rows=rows, length=length)
        assert distance(logits(compiled, batch), logits(model, batch)) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["dora(rank=2)", "bitfit(targets=['norm', 'linear'])", "ssf()", "ln_tuning()"]
)
def test_other_methods_compile(method: str) -> None:
    model = adapted("bert", method)
    batch = batch_for(model)
    expected = logits(model, batch)
    assert distance(logits(torch.compile(model, fullgraph=True), batch), expected) < CLOSE
    assert acts(model, batch, expected)
