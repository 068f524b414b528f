"""LoRA+: its groups, and that they are all that differs from LoRA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import inlay
from inlay.errors import ConfigError, TrainingError
from inlay.testing.layers import deltas_of, settled
from inlay.testing.models import batch_for
from inlay_lora import LoRA, LoRAPlus


def named(model: nn.Module) -> dict[str, float]:
    """Return the rate of each parameter in the model's groups, by its last name and kind of layer."""
    names = {id(p): n for n, p in model.named_parameters()}
    groups = inlay.parameter_groups(model)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates: dict[str, float] = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            kind = "embedding." if "word_embeddings" in name else ""
            assert rates.setdefault(kind + name.rpartition(".")[2], group["lr"]) == group["lr"]
    return rates


def test_every_tensor_is_in_one_group_at_its_rate() -> None:
    model = settled("bert")
    method = LoRAPlus(ratio=8, embedding_lr=1e-5, targets=("query", "embedding"))
    inlay.attach(model, method)
    lr = method.lr
    assert named(model) == {"down": lr, "up": 8 * lr, "embedding.down": 1e-5, "embedding.up": 1e-5}


def test_a_given_rate_is_that_of_a() -> None:
    model = settled("bert")
    inlay.attach(model, LoRAPlus(ratio=4))
    assert sorted(g["lr"] for g in inlay.parameter_groups(model, lr=1e-3)) == [1e-3, 4e-3]


def test_the_ratio_lasts_through_a_schedule() -> None:
    model = settled("bert")
    inlay.attach(model, LoRAPlus())
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    schedule = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _ in range(4):
        slow, fast = (group["lr"] for group in optimizer.param_groups)
        assert fast == pytest.approx(16 * slow, rel=1e-12)
        optimizer.step()
        schedule.step()


def trained(method: LoRA, **settings: Any) -> nn.Module:
    model = settled("bert")
    inlay.attach(model, method, seed=0)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-2), **settings)
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch_for(model, labels=True)).loss.backward()
        optimizer.step()
    return model


def test_ratio_one_is_plain_adamw_to_the_bit() -> None:
    plain, plus = trained(LoRA(), weight_decay=0.1), trained(LoRAPlus(ratio=1), weight_decay=0.1)
    for one, two in zip(plain.parameters(), plus.parameters(), strict=True):
        assert torch.equal(one, two)


def test_from_equal_gradients_b_moves_ratio_times_as_far() -> None:
    model = settled("bert")
    inlay.attach(model, LoRAPlus(ratio=8, targets=("query",), layers=(0,)))
    (delta,) = deltas_of(model).values()
    before = copy.deepcopy(delta)
    for parameter in delta.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(inlay.parameter_groups(model, lr=0.125)).step()
    assert torch.equal(before.down - 0.125, delta.down)  # type: ignore[operator]
    assert torch.equal(before.up - 1.0, delta.up)  # type: ignore[operator]


def test_a_frozen_adapter_has_no_groups() -> None:
    model = settled("bert")
    inlay.attach(model, LoRAPlus(), name="fr")
    inlay.set_trainable(model)
    with pytest.raises(TrainingError, match="nothing learns"):
        inlay.parameter_groups(model)


def test_a_ratio_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ratio=0\.5"):
        LoRAPlus(ratio=0.5)
