"""VeRA, MiSS, DeLoRA, FourierFT, WaveFT, RandLoRA and VB-LoRA here against huggingface/peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.testing.layers import deltas_of, settled
from inlay.testing.quantised import packed
from inlay.testing.tools import distance

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from layer_methods import acts, batch_of, logits, same  # noqa: E402
from reparam_methods import PAIRS, gradients, pair  # noqa: E402

EVERY = [(name, family) for name, chosen in PAIRS.items() for family in chosen.families]
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to:UserWarning")


@pytest.mark.parametrize(("name", "family"), EVERY)
def test_the_same_tensors_give_the_same_logits_gradients_and_weights(name: str, family: str) -> None:
    other, model = pair(name, family)
    batch = batch_of(family)
    assert acts(family, model)
    assert same(logits(model, batch), logits(other, batch))
    for each in (other.double(), model.double()):  # a backward in float32 rounds more than the tolerance
        each(**batch).loss.backward()
    compared = gradients(PAIRS[name], other, model)
    assert len(compared) >= len(deltas_of(model))
    for tensor, ours, theirs in compared:
        assert same(ours, theirs), tensor
    inlay.merge(model, undo=False)
    merged: nn.Module = other.merge_and_unload()
    plain = settled(family).double().state_dict()
    changed = 0
    for key, tensor in merged.state_dict().items():
        assert same(model.state_dict()[key], tensor), key
        changed += not torch.equal(tensor, plain[key])
    assert changed >= 4


def test_peft_s_dropout_of_bat_does_nothing() -> None:
    """There only the other modes drop out; here every mode does (plugins/reparam/tests/test_miss.py)."""
    config = peft.MissConfig(r=8, init_weights="bat", miss_dropout=0.9, target_modules=["query"])
    model = peft.get_peft_model(settled("bert"), config)  # type: ignore[arg-type]
    layer: Any = model.base_model.model.bert.encoder.layer[0].attention.self.query.train()  # type: ignore[union-attr, index]
    with torch.no_grad():
        layer.miss_block["default"].normal_()
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), layer(x))


def test_peft_s_delora_knows_no_quantised_weight() -> None:
    """It takes norms of the packed bytes. Here they are those of what the bits stand for."""
    model = packed("llama", "nf4", hidden_size=64, intermediate_size=128)
    with pytest.raises(RuntimeError, match="floating point"):
        peft.get_peft_model(model, peft.DeloraConfig(target_modules=["q_proj"]))  # type: ignore[arg-type]
    inlay.attach(model, "delora(targets=['query'])")
    assert all(float(d.norms.min()) > 0 for d in deltas_of(model).values())  # type: ignore[union-attr, operator]


def test_peft_s_pairing_in_randlora_is_kept() -> None:
    """For its files: the formula, with B_n beside the n-th scaled A, is another function."""
    _, model = pair("randlora", "bert")
    delta: Any = next(iter(deltas_of(model).values()))
    B, A, scales, gains = delta.parts(torch.zeros(()))
    bases = B.unflatten(1, (delta.count, -1)).transpose(0, 1)
    formula = sum(bases[n] @ torch.diag(scales[:, n]) @ A @ torch.diag(gains[n]) for n in range(delta.count))
    product = delta.product(torch.zeros(()))
    assert distance(formula, product) > 0.1
