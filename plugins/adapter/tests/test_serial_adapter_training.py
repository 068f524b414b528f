"""Serial adapters at work: what learns, checkpointing, routing, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.stack import need_state
from inlay.testing.effects import output
from inlay.testing.layers import fit, gradients
from inlay.testing.models import batch_for, build
from inlay.testing.tools import shake
from inlay_adapter import SerialAdapter

PLACEMENTS = ("houlsby", "pfeiffer")
DOUBLE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def bottlenecks(model: nn.Module, name: str = "default") -> list[Any]:
    """Return the sublayer deltas of an adapter in model order."""
    return [d for s, d in need_state(model).adapter_of(name).placed if s.kind == "sublayer"]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_only_the_adapter_learns_and_detach_leaves_no_trace(placement: str) -> None:
    model = build("bert")
    batch = batch_for(model, labels=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = output(model, batch)
    inlay.attach(model, SerialAdapter(placement, rank=4), train=("head",))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model), weight_decay=0.1)
    model(**batch).loss.backward()
    inlay.check_training(model, optimizer)
    norms = [n for n, p in model.named_parameters() if p.grad is not None and "LayerNorm.inlay" in n]
    assert len(norms) == (2 * 5 if placement == "houlsby" else 0)
    optimizer.step()
    assert not torch.equal(output(model, batch), first)
    inlay.detach(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(output(model, batch), first)


def test_weight_decay_spares_biases_norms_and_scales() -> None:
    model = build("bert")
    inlay.attach(model, SerialAdapter(scale="learned"))
    matrices, vectors = inlay.parameter_groups(model)
    assert "weight_decay" not in matrices
    assert vectors["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in matrices["params"])
    assert len(matrices["params"]) == 4 * 2
    assert all(p.ndim == 1 for p in vectors["params"])
    assert len(vectors["params"]) == 4 * 3 + 5 * 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", [("llama", "houlsby"), ("llama", "pfeiffer"), ("bert", "pfeiffer")])
def test_gradient_checkpointing_gives_the_same_gradients(where: tuple[str, Any], reentrant: bool) -> None:
    family, placement = where
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    model = build(family, dtype=torch.float64, **changes)
    inlay.attach(model, SerialAdapter(placement, rank=4))
    shake(model, size=1.0)
    model.train()
    batch = batch_for(model, labels=True)
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, batch)
    assert expected.keys() == found.keys()
    assert len(expected) >= 8
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **DOUBLE)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_of_a_batch_take_their_own_adapters(placement: str) -> None:
    model = build("bert", dtype=torch.float64)
    for name in ("fr", "de"):
        inlay.attach(model, SerialAdapter(placement, rank=4), name=name)  # type: ignore[arg-type]
    shake(model, size=1.0)
    batch = batch_for(model)
    alone = []
    for row, names in enumerate((("fr",), ("de",), ())):
        with inlay.use(model, *names):
            alone.append(output(model, batch)[row])
    with inlay.route(model, ["fr", "de", None]):
        torch.testing.assert_close(output(model, batch), torch.stack(alone), **DOUBLE)
    assert not torch.allclose(alone[0], alone[2])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_generation_with_a_cache_equals_full_forwards(placement: str) -> None:
    model = build("llama")
    inlay.attach(model, SerialAdapter(placement, rank=4))  # type: ignore[arg-type]
    shake(model, size=2.0)
    batch = batch_for(model, rows=2)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :3] = 0
    greedy: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = [
        model.generate(**batch, **greedy, **settings)
        for settings in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    with inlay.use(model):
        assert not torch.equal(model.generate(**batch, **greedy), found[0])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_learns(placement: str) -> None:
    """Sixty AdamW steps at the method's own rate on one batch, the head frozen."""
    model = build("bert", initializer_range=0.2)  # with 0.02 a random base passes almost nothing on
    inlay.attach(model, SerialAdapter(placement, rank=16), seed=0)  # type: ignore[arg-type]
    batch = batch_for(model, rows=8, labels=True)
    before, after = fit(model, batch)
    assert after < {"houlsby": 0.3, "pfeiffer": 0.7}[placement] * before
