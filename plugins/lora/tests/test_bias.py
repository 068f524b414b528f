"""Biases that learn with the factors: one of B's own, or the layer's as a shift."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import inlay
from inlay.errors import ConfigError
from inlay.testing.effects import output
from inlay.testing.layers import deltas_of, fit, settled, watch
from inlay.testing.models import batch_for, build
from inlay.testing.quantised import PACKED_SIZES, packed
from inlay.testing.refusal import refused
from inlay.testing.snapshots import differences, snapshot
from inlay.testing.tools import distance, shake
from inlay_lora import DoRA, LoRA, PiSSA

PATH = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize(("bias", "scale"), [("own", 1.5), ("layer", 1.0)])
def test_output_and_merged_bias(method: type, bias: str, scale: float) -> None:
    model = settled("bert")
    before = snapshot(model)
    inlay.attach(model, method(rank=4, alpha=6, bias=bias, start=PiSSA()), seed=0)
    shake(model)
    layer, delta = model.get_submodule(PATH), deltas_of(model)[PATH]
    expected = layer.bias + scale * delta.bias
    x, y = watch(model, PATH, batch_for(model))
    adapted = output(model)
    inlay.merge(model)
    assert distance(layer.bias, expected) < 1e-6
    assert distance(y, F.linear(x, layer.weight, layer.bias)) < 1e-5
    assert distance(output(model), adapted) < 1e-5
    inlay.detach(model)
    assert not differences(before, model)


def test_slices_have_their_own_and_layers_without_one_get_one() -> None:
    model = settled("gpt2")
    inlay.attach(model, LoRA(bias="layer"), seed=0)
    shake(model)
    adapted, layer = output(model), model.get_submodule("transformer.h.0.attn.c_attn")
    bias = layer.bias.clone()
    shift = deltas_of(model)["transformer.h.0.attn.c_attn[value]"].bias
    inlay.merge(model)
    assert distance(layer.bias[64:], bias[64:] + shift) < 1e-6
    assert torch.equal(layer.bias[32:64], bias[32:64])
    assert distance(output(model), adapted) < 1e-5
    model = settled("llama")
    inlay.attach(model, LoRA(bias="own"), seed=0)
    shake(model)
    adapted, delta = output(model), deltas_of(model)["model.layers.0.self_attn.q_proj"]
    inlay.merge(model, undo=False)
    assert distance(model.model.layers[0].self_attn.q_proj.bias, delta.scale * delta.bias) < 1e-6
    assert distance(output(model), adapted) < 1e-5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_into_few_bits_scales_it_too(kind: str) -> None:
    """peft's merge into 4 and 8 bits adds it without s."""
    pytest.importorskip("bitsandbytes")
    model = packed("llama", kind, **PACKED_SIZES)
    inlay.attach(model, LoRA(rank=2, alpha=6, bias="own"), seed=0)
    shake(model)
    delta = deltas_of(model)["model.layers.0.self_attn.q_proj"]
    inlay.merge(model, quantised="dequantise")
    assert distance(model.model.layers[0].self_attn.q_proj.bias, 3 * delta.bias) < 1e-5


def test_counts_and_learning() -> None:
    model = settled("bert")
    plan = inlay.attach(model, LoRA(bias="own"), train=("head",), seed=0)
    assert plan.parts[-1].parameters == 4 * (8 * 64 + 32)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert after < 0.1 * before


def test_refusals() -> None:
    model = build("llama")
    for method, message in (
        (
            LoRA(bias="layer"),
            r'lora: no target has a bias .*\n.*bias="layer" at .* 3 more\n.*"own"',
        ),
        (LoRA(bias="own", targets=["embedding"]), r"lora: an embedding takes no bias\n.*embed_tokens"),
    ):
        with refused(ConfigError, message, model=model):
            inlay.attach(model, method)
