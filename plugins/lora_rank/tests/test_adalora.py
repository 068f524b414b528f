"""AdaLoRA: the layer, its penalty, worth and budget by plain torch from the paper, and what is left of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import inlay
from inlay.errors import ConfigError
from inlay.stack import need_state
from inlay.testing.effects import output
from inlay.testing.layers import deltas_of, fit, settled
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay.testing.tools import distance, shake
from inlay_lora_rank import AdaLoRA

METHOD = AdaLoRA(rank=6, target_rank=3, t_init=2, t_final=4, every=2, targets=["query", "value", "up"])
Tensors = dict[str, dict[str, Tensor]]  # A, E and B of each layer


def tensors(model: nn.Module) -> Tensors:
    """Return copies of A, E and B by site."""
    return {
        site: {n: getattr(d, n).detach().clone() for n in ("down", "values", "up")}
        for site, d in deltas_of(model).items()
    }


def test_a_layer_is_the_formula() -> None:
    """y = x Wᵀ + b + alpha / (r + 1e-5)·B (E ⊙ A) x, its gradients, and the merged weight."""
    model = settled("bert").double()
    inlay.attach(model, AdaLoRA(rank=4, alpha=6.0, targets=["query"]), seed=0)
    shake(model, size=1.0)
    path = "bert.encoder.layer.0.attention.self.query"
    layer, delta = model.get_submodule(path), deltas_of(model)[path]
    own = {n: p.detach().clone().requires_grad_() for n, p in delta.named_parameters()}
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = 6.0 / (4 + 1e-5) * own["up"] @ (own["values"][:, None] * own["down"])
    expected, got = F.linear(x, layer.weight + change, layer.bias), layer(x)
    assert distance(got, expected) < 1e-12
    assert distance(got, F.linear(x, layer.weight, layer.bias)) > 0.01
    got.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in delta.named_parameters():
        assert distance(parameter.grad, own[name].grad) < 1e-12, name
    merged = (layer.weight + change).detach()
    inlay.merge(model, undo=False)
    assert distance(model.get_submodule(path).weight, merged) < 1e-12


def test_the_start() -> None:
    """A and B are N(0, 0.02²), E is 0: exactly the base."""
    model = build("bert", hidden_size=128, intermediate_size=256)
    before = output(model)
    inlay.attach(model, AdaLoRA(rank=8), seed=0)
    assert torch.equal(output(model), before)
    for own in tensors(model).values():
        assert not own["values"].any()
        assert all(0.018 < float(own[n].std()) < 0.022 for n in ("down", "up"))


def test_the_penalty() -> None:
    """0.3 times the mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ over all A and B."""
    model = settled("llama")
    inlay.attach(model, AdaLoRA(rank=4, orthogonality=0.3, targets=["query", "down"]), seed=0)
    shake(model)
    off = []
    for own in tensors(model).values():
        a, b, one = own["down"].double(), own["up"].double(), torch.eye(4)
        off += [float((a @ a.T - one).square().sum().sqrt()), float((b.T @ b - one).square().sum().sqrt())]
    assert len(off) == 8
    assert float(inlay.auxiliary_loss(model).detach()) == pytest.approx(0.3 * sum(off) / 8, rel=1e-5)


def test_the_published_counts() -> None:
    """Two layers of 32 and 64: 2,724 with rank 6 at q, v, up; BERT-base at rank 12."""
    assert (
        inlay.plan(build("bert", intermediate_size=64), METHOD).parameters
        == 2 * 6 * (2 * (32 + 32 + 1) + (32 + 64 + 1))
        == 2_724
    )
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    each = 4 * (768 + 768 + 1) + 2 * (768 + 3072 + 1)
    assert inlay.plan(model, AdaLoRA()).parameters == 12 * 12 * each == 1_991_520


@pytest.mark.parametrize(
    ("step", "ranks"), [(10, 144), (11, 141), (30, 113), (45, 102), (60, 97), (79, 96), (80, 96)]
)
def test_the_budget(step: int, ranks: int) -> None:
    """What both reference implementations give for 12 layers of rank 12 to 8 in 100 steps."""
    method = AdaLoRA(rank=12, target_rank=8, t_init=10, t_final=20)
    assert method.budget(step, 80, 12) == ranks


def reference(seen: list[tuple[Tensors, Tensors]], steps: int) -> list[dict[str, list[bool]]]:
    """Return which ranks METHOD keeps after each step, from each step's parameters and gradients.

    Written from the paper, a rank at a time.
    """
    mean: dict[Any, Tensor] = {}
    spread: dict[Any, Tensor] = {}
    kept: dict[str, list[bool]] = {}
    found, last = [], steps - 4
    for number, (after, gradients) in enumerate(seen, 1):
        for site, own in after.items() if number < last else ():
            for name, value in own.items():
                sensitivity = (value * gradients[site][name]).abs()
                key, zero = (site, name), torch.zeros_like(value)
                mean[key] = 0.85 * mean.get(key, zero) + 0.15 * sensitivity
                spread[key] = 0.85 * spread.get(key, zero) + 0.15 * (sensitivity - mean[key]).abs()
        fall = (1 - (number - 2) / (last - 2)) ** 3
        if number == last or (2 < number < last and number % 2 == 0):
            worth = {}
            for site, own in after.items():
                s = {name: mean[site, name] * spread[site, name] for name in own}
                for k in range(6):
                    worth[site, k] = float(s["values"][k] + s["down"][k].mean() + s["up"][:, k].mean())
            best = sorted(worth, key=worth.__getitem__, reverse=True)
            best = best[: int((6 - 3) * len(after) * fall + 3 * len(after))]
            kept = {site: [(site, k) in best for k in range(6)] for site in after}
            found.append(kept)
        else:
            found.append(kept if number > last else {})
    return found


def test_ranks_are_shared_out_as_the_paper_says() -> None:
    """Twenty steps: after each, E is 0 where a reference says so, and nothing else was changed."""
    model = settled("bert").double()
    inlay.attach(model, METHOD, seed=0)
    optimizer = torch.optim.SGD(inlay.parameter_groups(model, lr=0.05))
    updated: list[tuple[Tensors, Tensors]] = []

    def note(*_: Any) -> None:  # registered first: sees the parameters before AdaLoRA does
        gradients = {
            site: {n: getattr(d, n).grad.clone() for n in ("down", "values", "up")}
            for site, d in deltas_of(model).items()
        }
        updated.append((tensors(model), gradients))

    optimizer.register_step_post_hook(note)
    inlay.lifecycle(model, optimizer, steps=20)
    left = []
    for number in range(20):
        optimizer.zero_grad()
        batch = batch_for(model, seed=number, labels=True)
        (model(**batch).loss + inlay.auxiliary_loss(model)).backward()
        optimizer.step()
        left.append(tensors(model))
    for number, kept in enumerate(reference(updated, 20)):
        for site, own in left[number].items():
            was = updated[number][0][site]
            mask = torch.tensor(kept.get(site, [True] * 6))
            assert torch.equal(own["values"], was["values"] * mask), (number + 1, site)
            assert all(torch.equal(own[n], was[n]) for n in ("down", "up"))
    counts = [sum(int(own["values"].count_nonzero()) for own in step.values()) for step in left]
    assert counts[:3] == [36, 36, 36]
    assert counts[15:] == [18] * 5  # target_rank times six layers
    assert min(counts[3:15]) < max(counts[3:15])


def trained(steps: int = 12, **changes: Any) -> nn.Module:
    settings = {"rank": 6, "target_rank": 3, "t_final": 3, "targets": ["query", "value", "up"], **changes}
    model = settled("bert")
    inlay.attach(model, AdaLoRA(**settings), seed=0)
    fit(model, batch_for(model, rows=6, labels=True), steps=steps)
    return model


def test_what_was_pruned_may_come_back_until_the_end() -> None:
    """A masked E keeps its gradient, and so moves away from 0 in the next step."""
    model = settled("bert")
    inlay.attach(model, AdaLoRA(rank=6, target_rank=1, every=4, targets=["query"]), seed=0)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model), lr=1e-2)
    inlay.lifecycle(model, optimizer, steps=40)
    left = []
    for step in range(6):
        optimizer.zero_grad()
        model(**batch_for(model, seed=step, labels=True)).loss.backward()
        optimizer.step()
        left.append(sum(int(own["values"].count_nonzero()) for own in tensors(model).values()))
    assert left[3] < left[2] == left[4] == 12


def test_a_plain_lora_has_the_ranks_that_are_left() -> None:
    """The scale stays that of the rank at the start; sites without a rank left are a LoRA of rank 1, zero."""
    model = trained()
    left = {site: int(own["values"].count_nonzero()) for site, own in tensors(model).items()}
    assert sum(left.values()) == 18
    assert len(set(left.values())) > 1, "ranks moved between layers"
    before = output(model)
    report = inlay.to_lora(model, "default", name="plain")
    assert {s.site: s.rank for s in report.sites} == left
    with inlay.use(model, "plain"):
        torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-6)


def test_ties_leave_exactly_the_budget() -> None:
    """Gradients of 0 make every rank worth the same; the references would drop them all."""
    model = settled("bert")
    inlay.attach(model, AdaLoRA(rank=4, target_rank=2, targets=["query"]), seed=0)
    optimizer = torch.optim.SGD(inlay.parameter_groups(model, lr=0.0))
    inlay.lifecycle(model, optimizer, steps=2)
    for delta in deltas_of(model).values():
        nn.init.ones_(delta.values)
    for _ in range(2):
        (0.0 * model(**batch_for(model, labels=True)).loss).backward()
        optimizer.step()
    assert [d.values.tolist() for d in deltas_of(model).values()] == [[1.0] * 4, [0.0] * 4]


def test_equal_ranks_prune_nothing() -> None:
    model = trained(rank=3, target_rank=3)
    assert all(own["values"].all() for own in tensors(model).values())


def test_an_adapter_not_in_use_is_left_alone() -> None:
    model = settled("bert")
    inlay.attach(model, METHOD, "idle", seed=0)
    for delta in deltas_of(model, "idle").values():
        nn.init.ones_(delta.values)
    inlay.attach(model, "adalora(rank=3, target_rank=2)", "busy", activate=False)
    with inlay.use(model, "busy"):
        optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
        inlay.lifecycle(model, optimizer, steps=9)
        model(**batch_for(model, labels=True)).loss.backward()
        optimizer.step()
    assert all(bool((d.values == 1).all()) for d in deltas_of(model, "idle").values())
    assert sum(int(d.values.count_nonzero()) for d in deltas_of(model, "busy").values()) < 3 * 12


@pytest.mark.parametrize(
    ("steps", "settings"),
    [(None, {}), (6, {"t_init": 2, "t_final": 4}), (3, {"t_final": 3}), (9, {"rank": 2, "target_rank": 3})],
)
def test_a_schedule_that_cannot_be_is_refused(steps: int | None, settings: dict[str, int]) -> None:
    model = settled("bert")
    inlay.attach(model, AdaLoRA(**settings), seed=0)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    with refused(ConfigError, rf"cannot fall in this training\n  saw: steps={steps}, t_init=", model=model):
        inlay.lifecycle(model, optimizer, steps)
    assert not optimizer._optimizer_step_post_hooks


def test_a_rank_above_the_layers_is_refused() -> None:
    model = settled("bert")
    with refused(ConfigError, r"adalora: the rank is larger than a layer's\n  saw: rank 40 at", model=model):
        inlay.attach(model, AdaLoRA(rank=40))


def test_it_learns() -> None:
    model = settled("bert")
    inlay.attach(model, AdaLoRA(rank=6, target_rank=3), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert after < 0.5 * before
    inlay.check_training(model)
    assert need_state(model).placed
