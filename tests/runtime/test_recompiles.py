"""What `torch.compile` compiles anew: adapters of other shapes, and then only the first time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import inlay
from inlay.errors import ConfigError
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, lively, shake

pytest.importorskip("transformers")

STACK = "lora(rank=4) + prefix_tuning(length=3, hidden=8)"
CLOSE = 1e-5
LIMIT = 8  # torch._dynamo.config.recompile_limit


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def small() -> nn.Module:
    return lively("llama", num_hidden_layers=1)


def with_ranks(*ranks: int) -> nn.Module:
    """Return a model with an adapter of each rank, all with the same alpha, so of different scales."""
    model = small()
    for number, rank in enumerate(ranks):
        inlay.attach(model, f"lora(rank={rank})", name=f"a{number}")
    shake(model)
    return model


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def switched(model: nn.Module, compiled: Any) -> None:
    """Call the compiled model under each of its adapters; each gives what it gives uncompiled."""
    batch, seen = batch_for(model), list[Tensor]()
    for name in dict.fromkeys(p.path.partition("/")[0] for p in inlay.summary(model).parts):
        with inlay.use(model, name):
            seen.append(logits(compiled, batch))
            assert distance(seen[-1], logits(model, batch)) < CLOSE
    assert all(distance(a, b) > 0.01 for a, b in pairwise(seen))


def test_twelve_adapters_of_one_shape_share_one_graph() -> None:
    model, counter = with_ranks(*[4] * 12), CompileCounter()
    switched(model, torch.compile(model, backend=counter, fullgraph=True))
    assert counter.frame_count == 1


def test_twelve_ranks_share_two_graphs_where_shapes_of_parameters_may_vary() -> None:
    model, counter = with_ranks(*range(2, 14)), CompileCounter()
    assert torch._dynamo.config.recompile_limit == LIMIT
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        switched(model, torch.compile(model, backend=counter, fullgraph=True))
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch tells of the limit
def test_twelve_ranks_reach_the_limit_otherwise_and_go_on_uncompiled() -> None:
    model, counter = with_ranks(*range(2, 14)), CompileCounter()
    switched(model, torch.compile(model, backend=counter))
    assert counter.frame_count == LIMIT


@pytest.mark.slow
def test_twelve_ranks_with_inductor() -> None:
    model = with_ranks(*range(2, 14))
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        switched(model, torch.compile(model, fullgraph=True))


@pytest.mark.parametrize(
    "inplace", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["model.compile()", "torch.compile"]
)
def test_what_was_compiled_before_runs_what_is_attached_after(inplace: bool) -> None:
    model, counter = small(), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    if inplace:
        model.compile(backend=counter, fullgraph=True)
        compiled = model
    batch = batch_for(model, labels=True)
    plain = logits(compiled, batch)
    assert counter.frame_count == 1
    inlay.attach(model, STACK, name="fr")
    shake(model)
    loss = compiled(**batch).loss
    assert counter.frame_count == 2
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = model.forward(**batch)
    expected.loss.backward()
    assert distance(plain, expected.logits.detach()) > 0.05
    assert distance(logits(compiled, batch), expected.logits.detach()) < CLOSE
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert distance(found[name], parameter.grad) < CLOSE, name
    inlay.detach(model)
    assert torch.equal(logits(compiled, batch), plain)


def test_what_torch_compile_gives_back_is_refused() -> None:
    model = small()
    compiled: Any = torch.compile(model, backend="eager")
    for verb, act in (("attach", inlay.attach), ("plan", inlay.plan)):
        match = (
            rf"{verb} needs the model that torch.compile was given[\s\S]*an? OptimizedModule around a Llama"
        )
        with pytest.raises(ConfigError, match=match):
            act(compiled, "lora(rank=4)")
    assert list(model.state_dict()) == list(small().state_dict())
