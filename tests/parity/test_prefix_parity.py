"""Prefix tuning beside huggingface/peft: same keys and values in, same logits and gradients out.

peft puts the prefix into the cache, which shifts every token's position by its length; here tokens keep
theirs, so this side is told the positions that peft uses. On T5 peft is not right, and agrees only where
its three departures are undone (see the last test). For ViT it has no prefixes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.stack import need_state
from inlay.testing.layers import deltas_of, settled
from inlay.testing.tools import distance

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from layer_methods import acts, batch_of, logits, own, same, theirs  # noqa: E402

LENGTH, LAYERS, DIM = 3, 2, 8
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}
EVERY_FAMILY = pytest.mark.parametrize("family", TASKS)
MASKS = pytest.mark.parametrize("mask", ["none", "right", "left"])


def config(family: str, *, projected: bool) -> Any:
    how = {"prefix_projection": projected, "encoder_hidden_size": 12}
    return peft.PrefixTuningConfig(task_type=TASKS[family], num_virtual_tokens=LENGTH, **how)


def encoder(model: Any) -> dict[str, Tensor]:
    return dict(model.prompt_encoder["default"].named_parameters())


def flat(family: str) -> tuple[nn.Module, nn.Module]:
    """Return both models with keys and values that are parameters themselves."""
    other = theirs(family, config(family, projected=False))
    rows = encoder(other)["embedding.weight"].detach()
    pairs = rows.view(LENGTH, LAYERS, 2, -1, DIM).permute(1, 2, 3, 0, 4)
    model = settled(family)
    inlay.attach(model, f"prefix_tuning(length={LENGTH}, reparam=False)")
    with torch.no_grad():
        for (key, value), delta in zip(pairs, deltas_of(model).values(), strict=True):
            delta.key.copy_(key)  # type: ignore[union-attr, operator]
            delta.value.copy_(value)  # type: ignore[union-attr, operator]
    return other, model


def projected(family: str) -> tuple[nn.Module, nn.Module]:
    """Return both models with a generator; peft's table is as wide as the keys, here of full width."""
    full = {"num_key_value_heads": 4} if family == "llama" else {}
    other = theirs(family, config(family, projected=True), **full)
    model = settled(family, **full)
    inlay.attach(model, f"prefix_tuning(length={LENGTH}, hidden=12)")
    (generator,) = need_state(model).placed[0].adapter.shared.values()
    names = {"embedding.weight": "table", "transform.0.weight": "down", "transform.0.bias": "down_bias",
             "transform.2.weight": "up", "transform.2.bias": "up_bias"}  # fmt: skip
    held = dict(generator.named_parameters())
    assert sorted(names.values()) == sorted(held)
    with torch.no_grad():
        for name, tensor in encoder(other).items():
            held[names[name]].copy_(tensor)
    return other, model


def batches(family: str, mask: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what peft gets, and what this side gets: the same, with the positions that peft makes of it."""
    batch = batch_of(family)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if mask != "none":
        batch["attention_mask"][0, slice(5, None) if mask == "right" else slice(0, 2)] = 0
    rows, length = batch["input_ids"].shape
    positions = torch.arange(LENGTH, LENGTH + length).expand(rows, length)
    return batch, {**batch, "position_ids": positions}


@EVERY_FAMILY
@MASKS
def test_flat_prefixes(mask: str, family: str) -> None:
    other, model = flat(family)
    batch, here = batches(family, mask)
    assert acts(family, model)
    assert same(logits(model, here), logits(other, batch))


@EVERY_FAMILY
@MASKS
def test_generated_prefixes(mask: str, family: str) -> None:
    other, model = projected(family)
    batch, here = batches(family, mask)
    assert same(logits(model, here), logits(other, batch))


@EVERY_FAMILY
def test_the_same_gradients(family: str) -> None:
    other, model = flat(family)
    batch, here = batches(family, "right")
    other.double()(**batch).loss.backward()
    model.double()(**here).loss.backward()
    rows = encoder(other)["embedding.weight"].grad
    assert rows is not None
    pairs = rows.view(LENGTH, LAYERS, 2, -1, DIM).permute(1, 2, 3, 0, 4)
    for (key, value), delta in zip(pairs, deltas_of(model).values(), strict=True):
        assert same(delta.key.grad, key)  # type: ignore[union-attr, arg-type]
        assert same(delta.value.grad, value)  # type: ignore[union-attr, arg-type]


def without_relative_bias(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "decoder" in name and "relative_attention_bias" in name:
                parameter.zero_()
    return model


def test_t5_where_pefts_departures_are_undone() -> None:
    """peft prefixes the decoder's self-attention alone; of L layers, layer i reads the keys and values made
    for layer 2i mod L; and the prefix's columns get a relative bias as if they were tokens."""
    how = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH)
    other, model = theirs("t5", how), settled("t5")
    pairs = (
        encoder(other)["embedding.weight"].detach().view(LENGTH, LAYERS, 2, -1, DIM).permute(1, 2, 3, 0, 4)
    )
    sites = "cross_prefix=False, encoder_prefix=False"
    inlay.attach(model, f"prefix_tuning(length={LENGTH}, reparam=False, {sites})")
    with torch.no_grad():
        for layer, delta in enumerate(deltas_of(model).values()):
            delta.key.copy_(pairs[2 * layer % LAYERS][0])  # type: ignore[union-attr, operator]
            delta.value.copy_(pairs[2 * layer % LAYERS][1])  # type: ignore[union-attr, operator]
    batch = batch_of("t5")
    assert acts("t5", model)
    assert distance(logits(model, batch), logits(other, batch)) > 0.01
    without_relative_bias(model)
    without_relative_bias(other)
    assert same(logits(model, batch), logits(other, batch))


@EVERY_FAMILY
def test_peft_learns_nothing_but_what_is_compared(family: str) -> None:
    assert list(own(flat(family)[0])) == ["prompt_encoder.embedding.weight"]
