"""Training that would not do what the user thinks it does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import inlay
from inlay.errors import ConfigError, StateError, TrainingError
from inlay.stack import need_state
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay_lora import LoRA

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def trained() -> nn.Module:
    model = build("llama")
    inlay.attach(model, LoRA(rank=2), "fr")
    model(**batch_for(model, labels=True)).loss.backward()
    return model


def resize(target: str) -> Callable[[nn.Module], None]:
    def spoil(model: nn.Module) -> None:
        inlay.attach(model, LoRA(targets=[target]), "rows", trainable=False)
        model.resize_token_embeddings(70, mean_resizing=False)  # type: ignore[operator]

    return spoil


def refreeze(model: nn.Module) -> None:
    model.requires_grad_(False)
    next(p for _, _, p in need_state(model).own_parameters()).requires_grad_(True)


def unfreeze(model: nn.Module) -> None:
    model.get_submodule(QUERY).weight.requires_grad_(True)


def forget(model: nn.Module) -> None:
    next(p for _, _, p in need_state(model).own_parameters()).grad = None


def stale(model: nn.Module) -> None:
    model.get_submodule(QUERY).weight.grad = torch.zeros(32, 32)


def freeze(model: nn.Module) -> None:
    inlay.set_trainable(model)
    model.zero_grad()


TRAINING = {
    "a head replaced": (
        resize("head"),
        r"modules with adapters were replaced or resized after attaching[\s\S]*lm_head",
    ),
    "an embedding resized": (
        resize("embedding"),
        r"were replaced or resized after attaching[\s\S]*embed_tokens",
    ),
    "a mask not kept to": (refreeze, r"a tensor that should learn is frozen[\s\S]*q_proj\.inlay\.0\.0\.up"),
    "a base tensor that learns": (
        unfreeze,
        rf"a base tensor requires a gradient[\s\S]*{QUERY}\.weight \(1 in all\)",
    ),
    "nothing that learns": (freeze, "nothing learns"),
    "no gradient": (forget, r"a trainable tensor got no gradient[\s\S]*q_proj\.inlay"),
    "a stale gradient": (stale, rf"a frozen tensor has a gradient[\s\S]*{QUERY}\.weight"),
}


@pytest.mark.parametrize("lr", [-1e-4, math.nan, math.inf])
def test_what_is_no_learning_rate_is_refused(lr: float, trained: nn.Module) -> None:
    with refused(ConfigError, "this cannot be a learning rate", model=trained):
        inlay.parameter_groups(trained, lr=lr)


@pytest.mark.parametrize(("spoil", "match"), TRAINING.values(), ids=TRAINING)
def test_training_that_would_not_do_what_it_should_is_refused(
    spoil: Callable[[nn.Module], None], match: str, trained: nn.Module
) -> None:
    inlay.check_training(trained)
    spoil(trained)
    with refused(TrainingError, match, model=trained):
        inlay.check_training(trained)


def test_a_stack_with_nothing_to_learn_is_refused_before_an_optimizer_is_made() -> None:
    model = build("llama")
    inlay.attach(model, "lora(rank=2) + ia3", "fr", trainable=False)
    with refused(TrainingError, r"nothing learns\n  saw: \d+ adapter tensors, all frozen", model=model):
        inlay.parameter_groups(model)


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ("value", r"the loss is nan\n.*fr/lora: \S*down is the first tensor with values that are not"),
        ("gradient", r"the loss is inf\n.*fr/lora: \S*down is the first tensor with a gradient that is not"),
        ("nowhere", r"the loss is nan\n.*every part's values and gradients are finite, so it is the base"),
    ],
)
def test_a_loss_that_is_not_finite_ends_a_loop(where: str, match: str, trained: nn.Module) -> None:
    inlay.check_training(trained, loss=torch.tensor(1.0))
    first = next(p for _, _, p in need_state(trained).own_parameters())
    with torch.no_grad():
        if where == "value":
            first[0, 0] = math.nan
        elif where == "gradient":
            assert first.grad is not None
            first.grad[0, 0] = math.inf
    loss = torch.tensor(math.inf if where == "gradient" else math.nan)
    with refused(TrainingError, match, model=trained):
        inlay.check_training(trained, loss=loss)


def test_an_optimizer_of_other_tensors_is_refused(trained: nn.Module) -> None:
    groups = inlay.parameter_groups(trained)
    inlay.check_training(trained, torch.optim.SGD(groups))
    fewer = torch.optim.SGD([p for g in groups for p in g["params"]][1:], lr=1e-3)
    with refused(TrainingError, "the optimizer misses a trainable tensor", model=trained):
        inlay.check_training(trained, fewer)
    more = torch.optim.SGD(trained.parameters(), lr=1e-3)
    with refused(
        TrainingError,
        r"the optimizer holds a tensor that does not learn[\s\S]*lm_head\.weight",
        model=trained,
    ):
        inlay.check_training(trained, more)
    foreign = torch.optim.SGD([*trained.parameters(), nn.Parameter(torch.zeros(1))], lr=1e-3)
    with refused(TrainingError, "a tensor that is not in the model", model=trained):
        inlay.check_training(trained, foreign)


def test_a_stage_that_is_not_there_is_refused(trained: nn.Module) -> None:
    with refused(StateError, "'fr' has no stage left to end", model=trained):
        inlay.advance(trained, "fr")
