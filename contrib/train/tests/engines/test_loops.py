"""Plain loops, with and without accelerate: accumulated batches make the step that one large batch makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import inlay
from inlay.testing.models import batch_for, build

STACK = "lora(rank=4) + prefix_tuning(length=2, hidden=8)"


@pytest.fixture
def fresh() -> Callable[[], Any]:
    def make() -> Any:
        model = build("llama").train()
        inlay.attach(model, STACK, "fr", train=("head",), seed=0)
        return model

    return make


def batches(model: Any) -> list[dict[str, Tensor]]:
    return [batch_for(model, seed=i, labels=True) for i in range(4)]


def learned(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def at_once(model: Any) -> dict[str, Tensor]:
    """Two steps, each on two batches joined."""
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    rows = batches(model)
    for pair in (rows[:2], rows[2:]):
        joined = {name: torch.cat([row[name] for row in pair]) for name in pair[0]}
        (model(**joined).loss + inlay.auxiliary_loss(model)).backward()
        inlay.check_training(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return learned(model)


def test_a_plain_loop_accumulates(fresh: Callable[[], Any]) -> None:
    model = fresh()
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    following = inlay.lifecycle(model, optimizer, steps=2)
    for i, batch in enumerate(batches(model), 1):
        ((model(**batch).loss + inlay.auxiliary_loss(model)) / 2).backward()
        if i % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    wanted, found = at_once(fresh()), learned(model)
    assert following.step == 2
    assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=2e-5) for name in wanted)


def accelerated(model: Any, folder: Path, *, stop: int = 4, resume: bool = False) -> dict[str, Tensor]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    following = inlay.lifecycle(model, optimizer, steps=2)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(following)
    if resume:
        accelerator.load_state(folder)
    for batch in batches(model)[2 if resume else 0 : stop]:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss + inlay.auxiliary_loss(model))
            optimizer.step()
            optimizer.zero_grad()
    if stop == 2:
        accelerator.save_state(folder)
    assert following.step == stop // 2
    assert accelerator.unwrap_model(wrapped) is model
    return learned(model)


def test_accelerates_loop_accumulates(fresh: Callable[[], Any], tmp_path: Path) -> None:
    wanted, found = at_once(fresh()), accelerated(fresh(), tmp_path)
    assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=2e-5) for name in wanted)


def test_accelerates_loop_resumes(fresh: Callable[[], Any], tmp_path: Path) -> None:
    wanted = accelerated(fresh(), tmp_path)
    accelerated(fresh(), tmp_path, stop=2)
    found = accelerated(fresh(), tmp_path, resume=True)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
