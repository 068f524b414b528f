"""Every installed method, and ten stacks, can learn one batch by heart; the base keeps its bits.

A method that cannot has a gradient, and may well lower its loss, yet lacks something: a part is not on the
path, a scale is off, a rate does nothing. Each is taken as it comes, on models wide enough for every default.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.stack import need_state, parse
from inlay.testing.cases import lively_settings
from inlay.testing.models import batch_for, build
from inlay.testing.rules.training import base_tensors
from inlay.testing.snapshots import digest

NAME = "fr"
LEAST = 0.1  # of the loss at the start, both in evaluation mode
STEPS = 400  # at most, of each rate
RATES = (1.0, 3.0, 10.0)  # times the method's own rate, which is for hundreds of batches of a wide model
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 256, "intermediate_size": 512, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128},
    "llama": {"hidden_size": 256, "intermediate_size": 512, "attention_bias": True, "mlp_bias": True,
              "max_position_embeddings": 128},
}  # fmt: skip
STACKS = (
    "lora + serial_adapter + prefix_tuning",
    "lora + ia3",
    "dora + p_tuning_v2",
    "serial_adapter + parallel_adapter",
    "prompt_tuning + lora",
    "oft + bitfit",
    "ln_tuning + vera + ssf",
    "fishmask + lora",
    "periodic_lora + ia3",
    "hra + loha + prefix_tuning",
)
# Where a default does not fit a layer: here values are half as wide as queries.
FITTING = {("llama", "vblora"): "vblora(vector_length=128)"}


def everything() -> list[str]:
    return [*sorted(inlay.methods()), *STACKS]


def quick() -> set[str]:
    """Return the first method of each package, and two stacks; the others take minutes together."""
    first = {origin.distribution: name for name, origin in sorted(inlay.methods().items(), reverse=True)}
    return {*first.values(), *STACKS[:2]}


def cases() -> list[Any]:
    found = []
    for family in SIZES:
        for text in everything():
            marks = [] if family == "bert" and text in quick() else [pytest.mark.slow]
            found.append(pytest.param(family, text, marks=marks, id=f"{family}: {text}"))
    return found


@pytest.mark.parametrize(("family", "text"), cases())
def test_one_batch_is_learnt_by_heart(family: str, text: str) -> None:
    left = []
    text = FITTING.get((family, text), text)
    for rate in RATES:
        model = base_of(family)
        base, batch = base_tensors(model), batch_for(model, rows=8, labels=True)
        before = digest(base)
        sees = any(part.method.calibrates for part in parse(text).parts)
        inlay.attach(model, text, NAME, seed=0, data=[batch] if sees else None)
        start = loss_of(model, batch)
        left.append(learn(model, batch, rate, enough=LEAST * start) / start)
        assert digest(base) == before
        if left[-1] < LEAST:
            return
    shares = ", ".join(f"{share:.3f}" for share in left)
    pytest.fail(f"{text}: {shares} of the loss is left at rates {RATES}")


def base_of(family: str) -> nn.Module:
    """Return a model whose layers and biases act."""
    model = build(family, **SIZES[family], **lively_settings(family))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@torch.no_grad()
def loss_of(model: nn.Module, batch: dict[str, Any]) -> float:
    return float(model.eval()(**batch).loss)


def learn(model: nn.Module, batch: dict[str, Any], rate: float, *, enough: float) -> float:
    """Train through every stage; return the loss, once it is low enough in the last stage."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        while True:
            paths = {p.path: inlay.stages(model, p.path) for p in need_state(model).find(NAME)}
            left = max(map(len, paths.values()))
            loss = train(model, batch, rate, STEPS // left, enough)
            if left == 1:
                return loss
            for path, stages in paths.items():
                if len(stages) > 1:
                    inlay.advance(model, path)


def train(model: nn.Module, batch: dict[str, Any], rate: float, steps: int, enough: float) -> float:
    """Take steps until the loss is low enough, looked at every ten; return the lowest that was seen."""
    groups = [{**group, "lr": rate * group["lr"]} for group in inlay.parameter_groups(model)]
    optimizer, lowest = torch.optim.AdamW(groups, weight_decay=0.0), loss_of(model, batch)
    inlay.lifecycle(model, optimizer, steps)
    for step in range(1, steps + 1):
        model.train()
        optimizer.zero_grad()
        (model(**batch).loss + inlay.auxiliary_loss(model)).backward()
        inlay.check_training(model, optimizer)
        optimizer.step()
        if step % 10 == 0:
            lowest = min(lowest, loss_of(model, batch))
            if lowest < enough:
                break
    return lowest
