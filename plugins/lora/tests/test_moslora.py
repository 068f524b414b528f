"""MoSLoRA: starts of the mixer, counts, and that it is a LoRA of the same rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import deltas_of, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake
from inlay_lora import LoRA, LoRADropout, MoSLoRA, PeriodicLoRA, PiSSA, QALoRA
from inlay_lora.factors import LowRankMethod


def test_folded_into_a_plain_lora_it_gives_the_same() -> None:
    model, other = settled("llama"), settled("llama")
    inlay.attach(model, MoSLoRA(rank=4, alpha=6), seed=0)
    shake(model)
    inlay.attach(other, LoRA(rank=4, alpha=6, targets=("query", "key", "value", "up", "down")), seed=0)
    with torch.no_grad():
        for site, delta in deltas_of(model).items():
            mixed: Any = delta
            folded: Any = deltas_of(other)[site]
            folded.down.copy_(mixed.mixer @ mixed.down)
            folded.up.copy_(mixed.up)
    batch = batch_for(model)
    assert distance(model(**batch).logits, other(**batch).logits) < 1e-6


def test_with_the_identity_it_is_lora() -> None:
    model, other = settled("bert"), settled("bert")
    inlay.attach(model, MoSLoRA(rank=4, mixer="eye", targets=("query",)), seed=0)
    inlay.attach(other, LoRA(rank=4, targets=("query",)), seed=0)
    with torch.no_grad():
        for site, delta in deltas_of(model).items():
            one: Any = delta
            two: Any = deltas_of(other)[site]
            assert torch.equal(one.down, two.down)
            one.up.normal_(generator=torch.Generator().manual_seed(0))
            two.up.copy_(one.up)
    batch = batch_for(model)
    assert torch.equal(model(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize("mixer", ["kaiming", "orthogonal", "eye"])
def test_where_the_mixer_starts(mixer: str) -> None:
    model = settled("bert")
    inlay.attach(model, MoSLoRA(rank=16, mixer=mixer, targets=("query",)), seed=0)  # type: ignore[arg-type]
    one, two = (d.mixer.detach() for d in deltas_of(model).values())  # type: ignore[union-attr, operator]
    if mixer == "eye":
        assert torch.equal(one, torch.eye(16))
        return
    assert not torch.equal(one, two)
    if mixer == "orthogonal":
        assert distance(one @ one.T, torch.eye(16)) < 1e-6
    else:
        assert 0.9 / math.sqrt(16) < float(one.abs().max()) <= 1 / math.sqrt(16)


def test_only_b_learns_at_first() -> None:
    model = settled("bert")
    inlay.attach(model, MoSLoRA(targets=("query",)), seed=0)
    model(**batch_for(model, labels=True)).loss.backward()
    for delta in deltas_of(model).values():
        assert not delta.down.grad.any()  # type: ignore[union-attr]
        assert not delta.mixer.grad.any()  # type: ignore[union-attr]
        assert delta.up.grad.any()  # type: ignore[union-attr]


def test_the_papers_count() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    assert inlay.plan(model, MoSLoRA(rank=16)).parameters == 28_352_512


def test_a_start_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="mixer='zero'"):
        MoSLoRA(mixer="zero")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [MoSLoRA, PeriodicLoRA, LoRADropout, QALoRA])
def test_a_start_that_is_part_of_the_base_is_refused(kind: type[LowRankMethod]) -> None:
    match = rf"{kind.id}: a start that is part of the base cannot be kept apart here\n  saw: start=PiSSA"
    with pytest.raises(ConfigError, match=match):
        kind(start=PiSSA())
