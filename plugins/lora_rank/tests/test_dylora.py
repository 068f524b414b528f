"""DyLoRA: every rank by plain torch, what learns and moves in a step, the rank in use outside training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import inlay
from inlay.errors import ConfigError, MergedError
from inlay.testing.effects import output
from inlay.testing.folders import edit
from inlay.testing.layers import deltas_of, fit, settled
from inlay.testing.models import batch_for
from inlay.testing.refusal import refused
from inlay.testing.tools import distance, shake
from inlay_lora_rank import DyLoRA, set_rank

METHOD = DyLoRA(rank=4, alpha=6.0, targets=["query", "down"])


def adapted(method: DyLoRA = METHOD, *, double: bool = False) -> nn.Module:
    model = settled("bert")
    model = model.double() if double else model
    inlay.attach(model, method, seed=0)
    shake(model)
    return model


def drawn(model: nn.Module) -> int:
    """Return the rank of the step, which all layers must agree on."""
    (found,) = {int(d.drawn.count_nonzero()) for d in deltas_of(model).values()}
    return found


def still(model: nn.Module) -> nn.Module:
    """Return the model in training mode, without the base's own dropout."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_each_rank_is_the_plain_lora_of_its_first_rows(rank: int) -> None:
    """y = x Wᵀ + bias + (alpha / b) B[:, :b] A[:b] x: evaluated, merged, and in training with gradients."""
    model = adapted(DyLoRA(rank=4, alpha=6.0, frozen=False, targets=["query"]), double=True)
    path = "bert.encoder.layer.0.attention.self.query"
    layer, delta = model.get_submodule(path), deltas_of(model)[path]
    a, b = (p.detach().clone().requires_grad_() for p in (delta.down, delta.up))
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = layer.weight + 6.0 / rank * b[:, :rank] @ a[:rank]
    expected = F.linear(x, weight, layer.bias)
    set_rank(model, rank)
    assert distance(layer(x), expected) < 1e-12
    delta.draw(rank)
    still(model)
    got = layer(x)
    assert distance(got, expected) < 1e-12
    got.square().sum().backward()
    expected.square().sum().backward()
    assert distance(delta.down.grad, a.grad) < 1e-12
    assert distance(delta.up.grad, b.grad) < 1e-12
    inlay.merge(model, undo=False)
    assert distance(model.get_submodule(path).weight, weight) < 1e-12


def test_frozen_lets_the_last_rank_learn_alone() -> None:
    """The gradient of x goes through all ranks; that of the factors is as without `frozen` at b, else 0."""
    found: dict[bool, tuple[Tensor, ...]] = {}
    for frozen in (True, False):
        model = still(adapted(DyLoRA(rank=4, frozen=frozen, targets=["query"])))
        path = "bert.encoder.layer.1.attention.self.query"
        delta = deltas_of(model)[path]
        delta.draw(3)
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model.get_submodule(path)(x)
        y.square().sum().backward()
        found[frozen] = (y.detach(), x.grad, delta.down.grad, delta.up.grad)
    held, free = found[True], found[False]
    assert torch.equal(held[0], free[0])
    assert torch.equal(held[1], free[1])
    assert not held[2][[0, 1, 3]].any()
    assert not held[3][:, [0, 1, 3]].any()
    assert torch.equal(held[2][2], free[2][2])
    assert torch.equal(held[3][:, 2], free[3][:, 2])
    assert free[2][:3].any(1).all()
    assert not free[2][3].any()


@pytest.mark.parametrize("frozen", [True, False])
def test_only_what_learns_moves(frozen: bool) -> None:
    """Under AdamW with decay, too, whose momentum would move every row; each rank has its turn."""
    model = adapted(DyLoRA(rank=4, frozen=frozen))
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model), weight_decay=0.1)
    inlay.lifecycle(model, optimizer, steps=20)
    ranks = []
    for step in range(20):
        rank = drawn(model)
        ranks.append(rank)
        before = {n: (d.down.detach().clone(), d.up.detach().clone()) for n, d in deltas_of(model).items()}
        optimizer.zero_grad()
        still(model)(**batch_for(model, seed=step, labels=True)).loss.backward()
        optimizer.step()
        for name, delta in deltas_of(model).items():
            moved = (delta.down != before[name][0]).any(1), (delta.up != before[name][1]).any(0)
            learns = [k < rank and (k == rank - 1 or not frozen) for k in range(4)]
            assert moved[0].tolist() == moved[1].tolist() == learns, (step, name)
    assert set(ranks) == {1, 2, 3, 4}


def test_the_first_steps_from_zero_are_adamws_own() -> None:
    """At one rank it is plain LoRA: the same weights after five AdamW steps as by hand."""
    model = still(settled("bert"))
    inlay.attach(model, DyLoRA(rank=1, alpha=2.0, targets=["value"]), seed=0)
    twin = still(settled("bert"))
    factors = {}
    for path, delta in deltas_of(model).items():
        a, b = (p.detach().clone().requires_grad_() for p in (delta.down, delta.up))
        factors[path] = a, b
        twin.get_submodule(path).register_forward_hook(
            lambda m, args, y, a=a, b=b: y + 2.0 * (args[0] @ a.T) @ b.T
        )
    twin.requires_grad_(False)
    ours = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-2))
    theirs = torch.optim.AdamW([t for pair in factors.values() for t in pair], lr=1e-2)
    inlay.lifecycle(model, ours, steps=5)
    for step in range(5):
        for network, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            network(**batch_for(network, seed=step, labels=True)).loss.backward()
            optimizer.step()
    for path, delta in deltas_of(model).items():
        assert distance(delta.down, factors[path][0]) < 1e-5
        assert distance(delta.up, factors[path][1]) < 1e-4


def test_one_rank_for_all_layers_drawn_once_a_step_the_same_everywhere() -> None:
    """The ranks depend on the adapter's seed and the step's number alone; accumulating draws none."""

    def ranks(seed: int, accumulate: int = 1) -> list[int]:
        model = settled("bert")
        inlay.attach(model, METHOD, seed=seed)
        optimizer = torch.optim.SGD(inlay.parameter_groups(model))
        inlay.lifecycle(model, optimizer)
        found = []
        for _ in range(8):
            for _ in range(accumulate):
                found.append(drawn(model))
                model(**batch_for(model, labels=True)).loss.backward()
            optimizer.step()
        return found

    plain = ranks(0)
    assert plain != ranks(1)
    assert ranks(0, accumulate=2) == [rank for rank in plain for _ in range(2)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_sees_the_rank_of_its_step(reentrant: bool) -> None:
    """Gradient checkpointing runs blocks again in backward: the gradients are those of a plain run."""
    found = []
    for checkpointing in (False, True):
        model = still(adapted())
        optimizer = torch.optim.SGD(inlay.parameter_groups(model))
        inlay.lifecycle(model, optimizer)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch_for(model, labels=True)).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_compiled_once_for_every_rank() -> None:
    """A new rank is another content of the same tensors: no graph is compiled for it."""
    model = still(settled("bert", num_hidden_layers=1))
    inlay.attach(model, METHOD, seed=0)
    shake(model)
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    batch = batch_for(model, labels=True)
    model(**batch)  # transformers notes in the config what its labels are
    losses = []
    for rank in (4, 1, 3, 2):
        for delta in deltas_of(model).values():
            delta.draw(rank)
        loss = compiled(**batch).loss
        torch.testing.assert_close(loss, model(**batch).loss)
        losses.append(float(loss.detach()))
    torch._dynamo.reset()
    assert len(set(losses)) == 4
    assert len(seen) == 1


@pytest.mark.parametrize("frozen", [True, False])
def test_starts_at_the_base_at_every_rank(frozen: bool) -> None:
    model = settled("bert")
    before = output(model)
    inlay.attach(model, DyLoRA(rank=4, frozen=frozen), seed=0)
    for rank in range(1, 5):
        set_rank(model, rank)
        assert torch.equal(output(model), before)


def test_the_rank_in_use_is_saved_merged_and_written_as_lora(tmp_path: Path) -> None:
    model = adapted(DyLoRA(rank=4, eval_rank=3))
    by_setting = output(model)
    set_rank(model, 4)
    assert distance(output(model), by_setting) > 1e-3
    set_rank(model, 2, "default/dylora")
    chosen = output(model)
    inlay.save(model, tmp_path)
    fresh = settled("bert")
    inlay.load(fresh, tmp_path)
    assert torch.equal(output(fresh), chosen)
    set_rank(fresh, 3)
    assert torch.equal(output(fresh), by_setting), "all ranks are in the file"
    set_rank(fresh, 2)
    report = inlay.to_lora(fresh, "default", name="small")
    assert {s.rank for s in report.sites} == {2}
    with inlay.use(fresh, "small"):
        torch.testing.assert_close(output(fresh), chosen, rtol=1e-5, atol=1e-5)
    inlay.detach(fresh, "small")
    inlay.merge(fresh)
    torch.testing.assert_close(output(fresh), chosen, rtol=1e-5, atol=1e-5)


def test_a_rank_there_is_not_is_refused(tmp_path: Path) -> None:
    model = adapted()
    for rank in (0, 5, True, 2.0, "two"):
        with refused(ConfigError, "no such rank to use outside training\n  saw: .*rank=4", model=model):
            set_rank(model, rank)  # type: ignore[arg-type]
    fresh = settled("bert")
    with refused(ConfigError, "no such rank to use outside training\n  saw: 9, and rank=4", model=fresh):
        inlay.attach(fresh, DyLoRA(rank=4, eval_rank=9))
    inlay.save(model, tmp_path)
    edit(tmp_path, lambda m: m["parts"][0].update(data={"rank": 7}))
    with refused(ConfigError, "no such rank to use outside training\n  saw: 7", model=fresh):
        inlay.load(fresh, tmp_path)


def test_set_rank_where_it_cannot_be() -> None:
    model = adapted()
    inlay.attach(model, "trained(targets=['head'])", "head")
    text = "only a DyLoRA can be used at another rank than its own\n  saw: 'head', made of trained"
    with refused(ConfigError, text, model=model):
        set_rank(model, 2, "head")
    inlay.merge(model, parts=["default/dylora"])
    with refused(MergedError, "set_rank is undefined while adapters are merged", model=model):
        set_rank(model, 2)


def test_counts() -> None:
    """RoBERTa's and BERT's base size: 12 layers of q and v, r (d + d) each."""
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    assert inlay.plan(model, DyLoRA()).parameters == 24 * 8 * (768 + 768) == 294_912


def test_every_rank_learns() -> None:
    """One run; afterwards each rank fits the batch that it was trained on."""
    model = settled("bert")
    inlay.attach(model, DyLoRA(rank=4), seed=0)
    batch = batch_for(model, rows=6, labels=True)
    with torch.no_grad():
        before = float(model(**batch).loss)
    fit(model.train(), batch, steps=120)
    inlay.check_training(model)
    model.eval()
    for rank in range(1, 5):
        set_rank(model, rank)
        with torch.no_grad():
            assert float(model(**batch).loss) < 0.6 * before, rank
