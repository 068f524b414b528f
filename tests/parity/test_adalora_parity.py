"""AdaLoRA beside huggingface/peft, for whole trainings: the same ranks go, all tensors stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.testing.layers import deltas_of, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from layer_methods import own  # noqa: E402

NAMES = {"lora_A": "down", "lora_E": "values", "lora_B": "up"}
SCHEDULES = [{}, {"tinit": 2, "tfinal": 4, "deltaT": 2}, {"tinit": 5, "deltaT": 3}]


def pair(schedule: dict[str, int], steps: int) -> tuple[nn.Module, nn.Module]:
    """Return peft's AdaLoRA and this side's, started alike, in float64.

    peft 0.21.2 lets `ranknum`, which is in its scale, learn once its adapter is chosen: held still here.
    """
    targets = ["query", "value", "intermediate.dense"]
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=5, orth_reg_weight=0.3, total_step=steps, target_modules=targets,
        beta1=0.8, beta2=0.9, **schedule,
    )  # fmt: skip
    torch.manual_seed(0)
    other = peft.get_peft_model(settled("bert").double(), config).eval()
    for name, parameter in other.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)
    renamed = {"tinit": "t_init", "tfinal": "t_final", "deltaT": "every"}
    settings = "".join(f", {renamed[name]}={value}" for name, value in schedule.items())
    model = settled("bert").double()
    inlay.attach(
        model,
        "adalora(rank=6, target_rank=3, alpha=5, orthogonality=0.3, beta1=0.8, beta2=0.9, "
        f"targets=['query', 'value', 'up']{settings})",
    )
    with torch.no_grad():
        for name, tensor in own(other).items():
            site, _, leaf = name.rpartition(".")
            mine: Any = getattr(deltas_of(model)[site], NAMES[leaf])
            mine.copy_(tensor.view_as(mine))
    return other, model


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_twenty_steps_are_pefts(schedule: dict[str, int]) -> None:
    other, model = pair(schedule, 20)
    theirs = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=2e-2)
    mine = torch.optim.AdamW(inlay.parameter_groups(model, lr=2e-2))
    inlay.lifecycle(model, mine, 20)
    left = []
    for step in range(1, 21):
        batch = batch_for(model, seed=step, labels=True)
        theirs.zero_grad()
        other.base_model(**batch).loss.backward()  # this call adds the penalty; that of `other` does not
        theirs.step()
        other.base_model.update_and_allocate(step)
        mine.zero_grad()
        (model(**batch).loss + inlay.auxiliary_loss(model)).backward()
        mine.step()
        for name, tensor in own(other).items():
            site, _, leaf = name.rpartition(".")
            found = getattr(deltas_of(model)[site], NAMES[leaf])
            assert torch.equal(found.view_as(tensor) == 0, tensor == 0), (step, name)
            assert distance(found.view_as(tensor), tensor) < 1e-9 or not tensor.any(), (step, name)
        left.append(sum(int(d.values.count_nonzero()) for d in deltas_of(model).values()))
    assert left[0] == 36 or not schedule
    assert left[-1] == 18
