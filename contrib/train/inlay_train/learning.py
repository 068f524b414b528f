"""How the demo learns: the adapted model by AdamW, and a head alone on fixed features."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import inlay
from inlay_train.encoder import Encoded

WARM_UP = 0.1


def train(
    model: nn.Module,
    texts: Encoded,
    *,
    epochs: int,
    batch: int,
    seed: int,
    step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Train what is attached to `model`, each part at its method's own rate; call `step(loss)` after each.

    The rates rise over the first tenth of the steps and then fall to zero, both linearly.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    total = epochs * steps_per_epoch(texts, batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / (WARM_UP * total + 1), 1 - done / total)
    )
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the base's dropout
        for indices in chain.from_iterable(texts.epoch(batch, generator) for _ in range(epochs)):
            loss = cross_entropy(model(**texts.batch(indices)).logits, texts.labels[indices])
            loss = loss + inlay.auxiliary_loss(model)
            optimizer.zero_grad()
            loss.backward()
            inlay.check_training(model, optimizer)
            optimizer.step()
            schedule.step()
            step(loss.item())
    model.eval()


def steps_per_epoch(texts: Encoded, batch: int) -> int:
    return -(-len(texts) // batch)


def head_only(features: Tensor, labels: Tensor, classes: int, decay: float) -> nn.Linear:
    """Return a logistic regression on features (N, d), fitted to the end: the best a head alone does.

    Minimises cross-entropy + decay·‖W‖², W (classes, d), from zero, by L-BFGS.
    """
    head = nn.Linear(features.shape[1], classes)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(features), labels) + decay * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head
