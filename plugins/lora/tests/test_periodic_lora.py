"""PeriodicLoRA: what the end of a stage keeps, starts and leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError, TrainingError
from inlay.testing.layers import deltas_of, fit, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake
from inlay_lora import EVA, LoRA, PeriodicLoRA

METHOD = PeriodicLoRA(rank=2, alpha=4, n_stages=3)


def attached(method: PeriodicLoRA = METHOD, **settings: Any) -> nn.Module:
    model = settled("bert")
    inlay.attach(model, method, name="fr", seed=0, **settings)
    shake(model)
    return model


def changes(model: nn.Module) -> dict[str, Tensor]:
    """Return s·B A of the factors that learn, by site."""
    return {site: 2 * d.up.detach() @ d.down.detach() for site, d in deltas_of(model, "fr").items()}  # type: ignore[union-attr, operator]


def test_an_end_changes_no_output_and_starts_new_factors() -> None:
    model = attached()
    batch = batch_for(model)
    before, old = model(**batch).logits.detach(), dict(deltas_of(model, "fr"))
    downs = {site: d.down for site, d in old.items()}
    assert inlay.advance(model, "fr") == "stage 2"
    assert distance(model(**batch).logits, before) < 1e-6
    for site, delta in deltas_of(model, "fr").items():
        assert not delta.up.any()  # type: ignore[union-attr, operator]
        assert distance(delta.down, downs[site]) > 0.5  # type: ignore[arg-type]
        assert delta.down.requires_grad
        assert [n for n, _ in delta.named_parameters()] == ["down", "up"]


def test_stages() -> None:
    model = attached(PeriodicLoRA(n_stages=3, stage_steps=7))
    assert [(s.name, s.steps) for s in inlay.stages(model, "fr")] == [(f"stage {i}", 7) for i in (1, 2, 3)]
    assert inlay.advance(model, "fr") == "stage 2"
    assert inlay.advance(model, "fr") == "stage 3"
    assert [s.name for s in inlay.stages(model, "fr")] == ["stage 3"]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert inlay.advance(model, "fr") is None
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_an_optimizer_of_an_earlier_stage_is_noticed() -> None:
    model = attached()
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    inlay.advance(model, "fr")
    model(**batch_for(model, labels=True)).loss.backward()
    with pytest.raises(TrainingError, match="the optimizer misses a trainable tensor"):
        inlay.check_training(model, optimizer)
    fresh = torch.optim.AdamW(inlay.parameter_groups(model))
    assert not fresh.state
    inlay.check_training(model, fresh)


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_the_whole_change_is_the_sum_of_what_was_unloaded(momentum: float) -> None:
    """U_j = m U_{j−1} + (1 − m) s B_j A_j, U₀ = 0, added up; then what learns now."""
    model = attached(PeriodicLoRA(rank=2, alpha=4, n_stages=4, momentum=momentum))
    base = settled("bert").state_dict()
    unloaded: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    for seed in (1, 2, 3):
        for site, change in changes(model).items():
            unloaded[site] = momentum * unloaded.get(site, torch.tensor(0.0)) + (1 - momentum) * change
            total[site] = total.get(site, torch.tensor(0.0)) + unloaded[site]
        inlay.advance(model, "fr")
        shake(model, seed=seed)
    total = {site: total[site] + change for site, change in changes(model).items()}
    batch = batch_for(model)
    before = model(**batch).logits.detach()
    inlay.merge(model, undo=False)
    assert distance(model(**batch).logits, before) < 1e-6
    for site, change in total.items():
        moved = model.get_submodule(site).weight.detach() - base[f"{site}.weight"]  # type: ignore[operator]
        assert distance(moved, change) < 1e-5


def test_the_rank_grows_and_the_base_stays() -> None:
    model, batch = attached(), batch_for(settled("bert"), rows=4, labels=True)
    plain = settled("bert").state_dict()
    fit(model, batch, steps=5)
    inlay.advance(model, "fr")
    fit(model, batch, steps=5)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.items())
    delta = next(iter(deltas_of(model, "fr").values()))
    change: Any = delta.product(torch.empty(0))  # type: ignore[operator]
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-4) == 4
    inlay.detach(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.items())


def test_one_stage_is_lora() -> None:
    model, other = settled("bert"), settled("bert")
    inlay.attach(model, PeriodicLoRA(n_stages=1), seed=0)
    inlay.attach(other, LoRA(), seed=0)
    batch = batch_for(model, labels=True)
    fit(model, batch, steps=5)
    fit(other, batch, steps=5)
    assert torch.equal(model(**batch).logits, other(**batch).logits)
    assert [s.name for s in inlay.stages(model, "default")] == ["stage 1"]


@pytest.mark.parametrize("settings", [{}, {"start": EVA()}])
def test_it_resumes_in_the_middle(tmp_path: Path, settings: dict[str, Any]) -> None:
    method = PeriodicLoRA(rank=2, n_stages=3, momentum=0.5, **settings)
    model = attached(method, **({"data": [batch_for(settled("bert"))]} if settings else {}))
    for seed in (1, 2):
        inlay.advance(model, "fr")
        shake(model, seed=seed)
    inlay.save(model, tmp_path / "fr")
    other = settled("bert")
    inlay.load(other, tmp_path / "fr", name="fr")
    batch = batch_for(model, labels=True)
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    assert [s.name for s in inlay.stages(other, "fr")] == ["stage 3"]
    one, two = fit(model, batch, steps=3), fit(other, batch, steps=3)
    assert one == two


def test_what_is_frozen_is_not_dropped_out() -> None:
    model = attached(PeriodicLoRA(rank=2, alpha=4, dropout=0.5))
    inlay.advance(model, "fr")
    batch = batch_for(model)
    before = model(**batch).logits
    for delta in deltas_of(model, "fr").values():
        delta.train()
    assert torch.equal(model(**batch).logits, before)


def test_a_momentum_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"momentum=1\.0"):
        PeriodicLoRA(momentum=1.0)
