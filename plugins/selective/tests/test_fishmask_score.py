"""FishMask's score: sample by sample, the label's or the model's own expectation, ties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.authoring import gradients, own_loss
from inlay.stack import need_state
from inlay_selective import FishMask
from inlay_selective.fishmask import class_losses


class Logistic(nn.Module):
    """Two classes with logits 0 and w·x: p = σ(w·x). The mean loss over rows."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.layer = nn.Linear(len(weights), 1, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([weights]))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        one = self.layer(x)
        logits = torch.cat([torch.zeros_like(one), one], -1)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


def choice(model: nn.Module, data: Any, **settings: Any) -> list[int]:
    inlay.attach(model, FishMask(**settings), data=data)
    return need_state(model).placed[0].adapter.calibration["layer.weight"].tolist()


def test_samples_are_scored_one_by_one_whatever_the_batches() -> None:
    """Feature 0 has gradients ±1 that cancel in a batch's mean, feature 1 a small steady one."""
    x = torch.tensor([[1.0, 0.3], [1.0, 0.3]])
    labels = torch.tensor([0, 1])  # p = 1/2, so the gradients are ±x/2
    together = [{"x": x * torch.tensor([[1.0, 1.0], [1.0, -1.0]]), "labels": labels}]
    alone = [{k: v[row : row + 1] for k, v in together[0].items()} for row in range(2)]
    mean = Logistic([0.0, 0.0])
    mean(**together[0]).loss.backward()
    assert mean.layer.weight.grad is not None
    assert mean.layer.weight.grad.abs().argmax() == 1  # what squaring the batch's mean would choose
    assert choice(Logistic([0.0, 0.0]), together, density=0.5) == [0]
    assert choice(Logistic([0.0, 0.0]), alone, density=0.5) == [0]


def test_expect_is_p_times_1_minus_p_times_x_squared() -> None:
    model, x = Logistic([0.4, -1.1, 0.7]), torch.tensor([[0.5, 2.0, -1.0]])
    weight = model.layer.weight
    found = [g[id(weight)] for g in gradients(model, [{"x": x}], {id(weight)}, class_losses)]
    p = torch.sigmoid((weight @ x.T).squeeze()).detach()
    torch.testing.assert_close(sum(g**2 for g in found), p * (1 - p) * x**2)
    assert weight.grad is None


def test_expect_needs_no_labels_and_chooses_by_the_model_s_own_doubt() -> None:
    model = Logistic([0.0, 8.0])
    doubtful, certain = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    data = [{"x": torch.cat([doubtful, certain])}]
    assert choice(model, data, density=0.5, fisher="expect") == [0]
    wrong = [{"x": torch.cat([doubtful, certain]), "labels": torch.tensor([1, 0])}]
    assert choice(Logistic([0.0, 8.0]), wrong, density=0.5) == [1]


def test_expect_is_label_where_the_model_is_certain_and_right() -> None:
    model, x = Logistic([4.0, 1.0]), torch.tensor([[4.0, 2.0]])  # p(1) = 1 − 2e-8
    weight, sample = model.layer.weight, {"x": x, "labels": torch.tensor([1])}
    expect, label = (
        sum(g[id(weight)] ** 2 for g in gradients(model, [sample], {id(weight)}, losses))
        for losses in (class_losses, own_loss)
    )
    assert float((expect - label).abs().max()) < 1e-5


def test_only_the_first_samples_count_and_ties_go_to_the_first_entries() -> None:
    first = {"x": torch.tensor([[1.0, 0.0, 0.0, 0.0]]), "labels": torch.tensor([0])}
    later = {"x": torch.tensor([[0.0, 0.0, 0.0, 9.0]]), "labels": torch.tensor([0])}
    assert choice(Logistic([0.0] * 4), [first, later], density=0.5, samples=1) == [0, 1]
    assert choice(Logistic([0.0] * 4), [first, later], density=0.5, samples=2) == [0, 3]
