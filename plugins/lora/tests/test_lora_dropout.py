"""LoRA Dropout: its masks, the single pass and the ensemble."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import deltas_of, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake
from inlay_lora import LoRA, LoRADropout, ensemble


def layer_of(method: LoRA | LoRADropout, *, size: int = 64) -> tuple[nn.Module, Any]:
    """Return a linear layer without a bias that is 0 but for its adapter, and the delta."""
    model = nn.ModuleDict({"layer": nn.Linear(size, 48, bias=False)})
    nn.init.zeros_(model["layer"].weight)
    inlay.attach(model, method, seed=0)
    shake(model)
    (delta,) = deltas_of(model).values()
    return model["layer"], delta


def dense(layer: nn.Module, seed: int, size: int = 64) -> Tensor:
    """Return the ΔW (out, in) of the masks that this seed draws."""
    torch.manual_seed(seed)
    found: Tensor = layer(torch.eye(size)).detach().T
    return found


@pytest.mark.parametrize("rescale", [False, True])
def test_a_draw_leaves_out_whole_columns_and_rows(rescale: bool) -> None:
    layer, delta = layer_of(LoRADropout(rank=3, alpha=6, rescale=rescale, targets=["layer"]))
    layer.train()
    change = dense(layer, 1)
    columns, rows = change.abs().sum(0) > 0, change.abs().sum(1) > 0
    assert 0 < int(columns.sum()) < 64
    assert 0 < int(rows.sum()) < 48
    whole = 2 * delta.up.detach() @ delta.down * rows[:, None] * columns
    assert distance(change, whole * (4 if rescale else 1)) < 1e-6
    assert torch.linalg.matrix_rank(change) == 3


def test_the_share_of_entries_left() -> None:
    layer, _ = layer_of(LoRADropout(rank=2, dropout=0.3, targets=["layer"]))
    layer.train()
    left = torch.stack([(dense(layer, seed) != 0).float().mean() for seed in range(200)])
    assert abs(float(left.mean()) - 0.49) < 4 * float(left.std()) / 200**0.5


def test_one_mask_for_all_rows_of_a_call_and_another_for_the_next() -> None:
    layer, _ = layer_of(LoRADropout(rank=3, targets=["layer"]))
    layer.train()
    x = torch.randn(1, 64).expand(4, 7, 64)
    one, two = layer(x), layer(x)
    assert distance(one, one[:1, :1].expand_as(one)) < 1e-6
    assert distance(one, two) > 0.1


@pytest.mark.parametrize(("rescale", "share"), [(False, 0.36), (True, 1.0)])
def test_the_single_pass_is_the_mean_of_the_draws(rescale: bool, share: float) -> None:
    layer, delta = layer_of(LoRADropout(rank=3, dropout=0.4, rescale=rescale, targets=["layer"]), size=8)
    layer.eval()
    single = dense(layer, 0, 8)
    assert distance(single, share * 8 / 3 * delta.up.detach() @ delta.down) < 1e-6
    layer.train()
    draws = torch.stack([dense(layer, seed, 8) for seed in range(4000)])
    assert distance(draws.mean(0), single) < 0.1


def test_without_dropout_it_is_lora_to_the_bit() -> None:
    one, two = settled("bert"), settled("bert")
    inlay.attach(one, LoRADropout(dropout=0), seed=0)
    inlay.attach(two, LoRA(), seed=0)
    for model in (one, two):
        shake(model)
        deltas = deltas_of(model).values()
        for delta in deltas:
            delta.train()
    batch = batch_for(one)
    assert torch.equal(one(**batch).logits, two(**batch).logits)


def test_an_ensemble_draws_in_evaluation_and_ends_with_its_block() -> None:
    model = settled("bert")
    inlay.attach(model, LoRADropout(), seed=0)
    shake(model)
    batch = batch_for(model)
    with torch.no_grad():
        single = model(**batch).logits
        with ensemble(model):
            one, two = model(**batch).logits, model(**batch).logits
        assert not torch.equal(one, two)
        assert torch.equal(model(**batch).logits, single)
        with pytest.raises(RuntimeError, match="within"), ensemble(model):
            raise RuntimeError("within")
        assert torch.equal(model(**batch).logits, single)
    assert not any(module.training for module in model.modules())


def test_an_ensemble_of_one_without_dropout_is_evaluation() -> None:
    model = settled("bert")
    inlay.attach(model, LoRADropout(dropout=0), seed=0)
    shake(model)
    batch = batch_for(model)
    with torch.no_grad(), ensemble(model):
        drawn = model(**batch).logits
    assert torch.equal(drawn, model(**batch).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_draws_the_same_masks_again(reentrant: bool) -> None:
    model = settled("llama")
    inlay.attach(model, LoRADropout(), seed=0)
    shake(model)
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            how = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # type: ignore[operator]
        model.zero_grad()
        torch.manual_seed(0)
        model(**batch_for(model, labels=True)).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(distance(a, b) < 1e-6 for a, b in zip(*gradients, strict=True))


def test_a_share_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dropout=1\.0"):
        LoRADropout(dropout=1.0)


def test_dropout_is_not_of_activations() -> None:
    """Two rows of one call lose the same inputs."""
    layer, _ = layer_of(LoRADropout(rank=3, targets=["layer"]))
    layer.train()
    change = dense(layer, 3)
    torch.manual_seed(3)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    assert distance(layer(x), F.linear(x, change)) < 1e-6
