"""How the demo learns: the adapted model by AdamW, and a head alone on fixed features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice

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
    steps: int,
    batch: int,
    seed: int,
    rate: float = 1.0,
    step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Train what is attached to `model`, each part at `rate` times its method's own learning rate.

    The rates rise over the first tenth of the steps and then fall to zero, both linearly. `step(loss)` is
    called after each step, and may evaluate the model.
    """
    groups = inlay.parameter_groups(model)
    optimizer = torch.optim.AdamW([{**group, "lr": rate * group["lr"]} for group in groups])
    inlay.lifecycle(model, optimizer, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / (WARM_UP * steps + 1), 1 - done / steps)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the base's dropout
        for indices in islice(shuffled(texts, batch, seed), steps):
            model.train()
            loss = cross_entropy(model(**texts.batch(indices)).logits, texts.labels[indices])
            loss = loss + inlay.auxiliary_loss(model)
            optimizer.zero_grad()
            loss.backward()
            inlay.check_training(model, optimizer)
            optimizer.step()
            schedule.step()
            step(loss.item())
    model.eval()


def shuffled(texts: Encoded, batch: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of indices without end, epoch by epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in count():
        yield from texts.epoch(batch, generator)


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
