"""Settings given by role: which value a site gets, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay.authoring import by_site
from inlay.errors import ConfigError
from inlay.settings import FrozenDict
from inlay.stack import Stack, need_state, parse
from inlay.testing.effects import output
from inlay.testing.layers import deltas_of
from inlay.testing.models import build
from inlay.testing.refusal import refused
from inlay.testing.tools import shake
from inlay_lora import DoRA, LoRA


def ranks(family: str, rank: Any, targets: list[str]) -> dict[str, int]:
    model = build(family)
    inlay.attach(model, LoRA(rank=rank, targets=targets), seed=0)
    return {name: len(delta.down) for name, delta in deltas_of(model).items()}


def test_the_closest_key_holds() -> None:
    rank = {"default": 1, "linear": 2, "attention": 3, "query": 4, "layers.1.self_attn.q_proj": 5}
    found = ranks("llama", rank, ["attention", "up", "embedding"])
    last = {name.removeprefix("model."): r for name, r in found.items()}
    assert last["embed_tokens"] == 1
    assert last["layers.0.mlp.up_proj"] == 2
    assert last["layers.0.self_attn.o_proj"] == last["layers.0.self_attn.k_proj"] == 3
    assert last["layers.0.self_attn.q_proj"] == 4
    assert last["layers.1.self_attn.q_proj"] == 5


def test_sides_slices_and_globs_are_keys_too() -> None:
    found = ranks("t5", {"query": 2, "encoder.query": 3}, ["both.query"])
    assert {name.partition(".")[0]: r for name, r in found.items()} == {"encoder": 3, "decoder": 2}
    rank = {"c_attn": 2, "transformer.h.1.*": 2, "transformer.h.1.mlp.c_fc": 4, "up": 3}
    found = ranks("gpt2", rank, ["query", "up"])
    assert [found[f"transformer.h.{layer}.mlp.c_fc"] for layer in (0, 1)] == [3, 4]
    assert found["transformer.h.0.attn.c_attn[query]"] == 2


def test_scales_too() -> None:
    model = build("bert")
    method = LoRA(rank={"query": 2, "default": 4}, alpha={"value": 8.0, "default": 2}, scaling="rsqrt")
    inlay.attach(model, method, seed=0)
    scales = {name.rpartition(".")[2]: delta.scale for name, delta in deltas_of(model).items()}
    assert scales == {"query": pytest.approx(2 / 2**0.5), "value": pytest.approx(4.0)}


def test_they_are_data(tmp_path: Path) -> None:
    """Hashed, compared, copied, written as JSON and as text; read back from a checkpoint."""
    method = LoRA(rank={"query": 2, "default": 3})
    assert method == LoRA(rank={"default": 3, "query": 2}) != LoRA(rank=2)
    assert hash(method) == hash(LoRA(rank={"default": 3, "query": 2}))
    assert parse("lora(rank={'query': 2, 'default': 3})") == Stack.of(method)
    assert json.loads(json.dumps(method.to_dict()))["rank"] == {"query": 2, "default": 3}
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert other == method
        assert isinstance(other.rank, FrozenDict)
    model, fresh = build("bert"), build("bert")
    inlay.attach(model, method, seed=0)
    shake(model)
    inlay.save(model, tmp_path)
    inlay.load(fresh, tmp_path)
    assert torch.equal(output(fresh), output(model))
    assert next(iter(need_state(fresh).placed.values())).method == method


CHANGES = ["d['query'] = 1", "del d['query']", "d.update(a=1)", "d.pop('query')", "d.clear()", "d |= {}"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_does_not_change(change: str) -> None:
    rank = LoRA(rank={"query": 2, "value": 2}).rank
    with refused(ConfigError, r"a setting does not change\n  saw: {'query': 2"):
        exec(change, {"d": rank})
    assert rank == {"query": 2, "value": 2}


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (
            {"query": 4},
            r"dora: rank says nothing of a target\n.*value, a value; rank names 'query'\n",
        ),
        (
            {"query": 4, "key": 2, "value": 1},
            r"rank names something that is no target\n.*'key': 2; targets are",
        ),
        ({"default": 2, "quary": 1}, r"no target\n.*'quary'.*\n.*did you mean .*query"),
        (
            {"attention.self.query": 1, "*.query": 2, "value": 1},
            r"rank is ambiguous\n.*query is meant by",
        ),
        (
            {"query": 4, "value": 64},
            r"rank is larger.*\n.*rank 64 at .*value, 32 to 32 .*\n.*\"value\": 32",
        ),
    ],
)
def test_what_is_refused(rank: dict[str, int], message: str) -> None:
    model = build("bert")
    with refused(ConfigError, message, model=model):
        inlay.attach(model, DoRA(rank=rank, targets=["query", "value"]))


@pytest.mark.parametrize("rank", [{"query": 0}, {"query": 1.5}, {3: 4}, {"query": "8"}, {"query": {"a": 1}}])
def test_values_are_checked_one_by_one(rank: Any) -> None:
    with refused(ConfigError, r"LoRA: rank (is out of range|has the wrong type)"):
        LoRA(rank=rank)


def test_one_value_is_everybody_s() -> None:
    sites = inlay.anatomy(build("bert")).leaves[:3]
    assert by_site("any", "width", 7, sites) == [7, 7, 7]
