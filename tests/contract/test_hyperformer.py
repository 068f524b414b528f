"""Hyperformer on the contract: `prepare` once per call, tasks per row, shared hypernetworks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_checks import (
    GREEDY,
    batch_for,
    build,
    check_checkpointing,
    check_detach,
    check_round_trip,
    check_routing,
    logits,
    offered,
    padded,
    part,
    stir,
)
from rehearsal.hyperformer import Generated, Hyperformer, Network
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.errors import RoutingError
from inlay_prompt import PromptTuning

SMALL = {"tasks": 3, "reduction": 8, "embedding": 4, "hidden": 6, "projected": 5}


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    with offered(Hyperformer):
        yield


def attached(family: str, variant: str) -> nn.Module:
    model = build(family)
    inlay.attach(model, Hyperformer(variant=variant, **SMALL), "fr", seed=0)
    stir(model, "fr", std=0.2)
    return model


def by_hand(adapter: Any, site: Any, task: int) -> dict[str, Tensor]:
    """Return one adapter's tensors from the formulas, one task at a time."""
    d, r, z = site.out_features, site.out_features // 8, adapter.shared["tasks"][0][task]
    network: Any = dict(adapter.placed)[site].network.module
    if network.mix is not None:
        first, _, second, norm = network.mix
        joined = torch.cat(
            [z, network.layers[site.layer], network.positions[1 if site.role == "attention" else 0]]
        )
        hidden = torch.relu(first.weight @ joined + first.bias)
        z = F.layer_norm(second.weight @ hidden + second.bias, (5,), norm.weight, norm.bias, 1e-6)
    flat = network.weight @ z + network.bias
    found, start = {}, 0
    for name, shape in (("D", (r, d)), ("b_D", (r,)), ("U", (d, r)), ("b_U", (d,)), ("g", (d,)), ("b", (d,))):
        size = torch.Size(shape).numel()
        found[name] = flat[start : start + size].view(shape)
        start += size
    assert start == len(flat)
    return found


@pytest.mark.parametrize("family", ["t5", "llama", "bert"])
@pytest.mark.parametrize("variant", ["layer", "shared"])
def test_matches_plain_hooks_per_task(family: str, variant: str) -> None:
    model, reference = attached(family, variant), build(family)
    batch = batch_for(model)
    tasks = [2, 0, 2]
    adapter = part(model, "fr").adapter
    there = dict(reference.named_modules())
    names = {id(m): n for n, m in model.named_modules()}
    for site, _ in adapter.placed:

        def hook(module: nn.Module, args: Any, output: Any, site: Any = site) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            rows = []
            for row, task in enumerate(tasks):
                t = by_hand(adapter, site, task)
                z = F.gelu(y[row] @ t["D"].T + t["b_D"], approximate="tanh") @ t["U"].T + t["b_U"]
                z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                rows.append(y[row] + t["g"] * z + t["b"])
            y = torch.stack(rows)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        there[names[id(site.module)]].register_forward_hook(hook)
    with inlay.route(model, "fr", tasks=tasks):
        got = logits(model, batch)
    wanted = logits(reference, batch)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits(build(family), batch)).abs().max() > 1e-3


def test_counts_of_the_paper_on_t5_base() -> None:
    """One hypernetwork 2,547,480; layer variant 48 of them; shared 5,163,440 with 8 task vectors."""
    with torch.device("meta"):
        model = build("t5", d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    sizes = {"tasks": 8, "reduction": 32}
    assert inlay.plan(model, Hyperformer(variant="shared", **sizes)).parameters == 5_163_440
    assert inlay.plan(model, Hyperformer(variant="layer", **sizes)).parameters == 48 * 2_547_480 + 8 * 64


def test_stacks_start_from_different_values() -> None:
    model = build("t5")
    inlay.attach(model, Hyperformer(**SMALL), "fr", seed=0)
    shared = part(model, "fr").adapter.shared
    assert sorted(shared) == ["decoder", "encoder", "tasks"]
    assert not torch.equal(shared["encoder"].weight, shared["decoder"].weight)
    assert all(not list(delta.parameters()) for _, delta in part(model, "fr").adapter.placed)
    assert sum(isinstance(m, Network) for m in model.modules()) == 2


@pytest.mark.parametrize("variant", ["layer", "shared"])
def test_generated_once_per_call(variant: str) -> None:
    """The generators run once per call of the model, and not again for the tasks' repetitions."""
    model = attached("llama", variant)
    networks = [m for m in part(model, "fr").adapter.shared.values() if isinstance(m, Network)]
    calls: list[int] = []
    for network in networks:
        network.register_forward_hook(lambda m, a, out: calls.append(len(out)))
    with inlay.route(model, "fr", tasks=[1, 1, 0]):
        logits(model, batch_for(model))
    assert calls == [2] * len(part(model, "fr").adapter.placed)
    calls.clear()
    model.train()
    model.gradient_checkpointing_enable()
    with inlay.route(model, "fr", tasks=[1, 1, 1]):
        loss = model(**batch_for(model, labels=True)).loss
    loss.backward()
    assert calls == [1] * len(part(model, "fr").adapter.placed)


def test_zero_scales_are_the_base_and_a_layer_embedding_changes_its_own_layer() -> None:
    model = attached("llama", "shared")
    batch = batch_for(model)
    adapter = part(model, "fr").adapter
    network: Any = adapter.shared["stack"]
    seen: dict[str, Tensor] = {}
    for site, delta in adapter.placed:
        delta.register_forward_hook(lambda m, a, out, name=site.name: seen.update({name: out.clone()}))
    with inlay.route(model, "fr", tasks=[0, 1, 2]):
        logits(model, batch)
        before = dict(seen)
        network.layers.data[1] += 1.0
        logits(model, batch)
    changed = {n for n, t in seen.items() if not torch.equal(t, before[n])}
    assert changed == {s.name for s in adapter.sites if s.layer == 1}
    d = 32
    for tensor in (network.weight, network.bias):
        tensor.data[-2 * d :] = 0
    with inlay.route(model, "fr", tasks=[0, 1, 2]):
        assert torch.equal(logits(model, batch), logits(build("llama"), batch))


@pytest.mark.parametrize("variant", ["layer", "shared"])
def test_gradients(variant: str) -> None:
    """All of the adapter's tensors get one; of the task table only the batch's tasks."""
    model = attached("t5", variant)
    batch = batch_for(model)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    with inlay.route(model, "fr", tasks=[2, 0, 2]):
        loss = model(**batch).loss
    loss.backward()
    inlay.check_training(model, optimizer)
    own = dict(part(model, "fr").adapter.named_parameters())
    got = {id(p) for p in model.parameters() if p.grad is not None}
    assert got == {id(p) for p in own.values()}
    table = own.pop("shared.tasks.0").grad
    assert table.abs().sum(1).gt(0).tolist() == [True, False, True]
    assert [n for n, p in own.items() if not p.grad.any()] == []


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", ["layer", "shared"])
def test_checkpointing(variant: str, reentrant: bool) -> None:
    """Prepared tensors are leaves under reentrant checkpointing, and their gradient comes back once."""
    model = attached("llama", variant)
    batch = batch_for(model, labels=True)
    check_checkpointing(model, batch, reentrant=reentrant, names="fr", tasks=[2, 0, 2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_t5(reentrant: bool) -> None:
    """Two stacks of blocks, dropout, and cross-attention."""
    model = attached("t5", "shared")
    check_checkpointing(model, batch_for(model), reentrant=reentrant, names="fr", tasks=[2, 0, 2])


def test_tasks_and_adapters_per_row_equal_alone() -> None:
    """Rows differ in task, in adapter, and in having one at all."""
    model = attached("llama", "shared")
    batch = padded(model, [7, 3, 5, 6])
    check_routing(model, ["fr"] * 4, batch, tasks=[2, 0, 1, 2])
    inlay.attach(model, Hyperformer(variant="layer", **SMALL), "de", seed=1)
    stir(model, "de", seed=3)
    check_routing(model, ["de", "fr", None, "fr"], batch, tasks=[2, 0, 1, 1])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_with_tasks_equals_alone(family: str, options: dict[str, Any]) -> None:
    """Beams repeat their sample's task; T5's encoder runs before the beams are made."""
    model = attached(family, "shared")
    stir(model, "fr", seed=4)
    batch = padded(model, [6, 3, 5], left=family == "llama")
    tasks = [2, 0, 1]
    with inlay.route(model, "fr", tasks=tasks):
        together = model.generate(**batch, max_new_tokens=4, **GREEDY, **options)
    for row, task in enumerate(tasks):
        with inlay.route(model, "fr", tasks=[task]):
            own = {k: v[row : row + 1] for k, v in batch.items()}
            assert torch.equal(together[row], model.generate(**own, max_new_tokens=4, **GREEDY, **options)[0])


def test_round_trip_and_detach(tmp_path: Path) -> None:
    for variant in ("layer", "shared"):
        model = attached("t5", variant)
        batch = batch_for(model)
        check_round_trip(lambda: build("t5"), model, "fr", batch, tmp_path / variant, tasks=[1, 0, 2])
    plain = build("llama")
    check_detach(plain, lambda: inlay.attach(plain, Hyperformer(**SMALL), "fr"), batch_for(plain),
                 names="fr", tasks=[0, 1, 2])  # fmt: skip


@pytest.mark.parametrize(
    ("tasks", "saw"), [(None, "tasks=None"), ([0, 1, 3], r"\[0, 1, 3\]; it knows 0 to 2")]
)
def test_a_missing_or_unknown_task_is_refused(tasks: list[int] | None, saw: str) -> None:
    model = attached("llama", "shared")
    with inlay.route(model, "fr", tasks=tasks), pytest.raises(RoutingError, match=saw):
        model(**batch_for(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_virtual_tokens_pass_through_it_task_by_task(family: str) -> None:
    """In a stack with a prompt, its rows see the task of the row they stand in front of."""
    model = build(family)
    inlay.attach(model, Hyperformer(**SMALL) + PromptTuning(length=3), "fr", seed=0)
    stir(model, "fr", std=0.2)
    batch = batch_for(model)
    with inlay.route(model, "fr", tasks=[2, 0, 1]):
        together = logits(model, batch)
    for row, task in enumerate([2, 0, 1]):
        with inlay.route(model, "fr", tasks=[task]):
            alone = logits(model, {k: v[row : row + 1] for k, v in batch.items()})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_a_wrong_number_of_tasks_is_refused() -> None:
    model = attached("llama", "shared")
    with inlay.route(model, "fr", tasks=[0, 1]), pytest.raises(RoutingError, match="the task ids"):
        model(**batch_for(model))


def test_delta_has_no_weight_form() -> None:
    model = attached("llama", "layer")
    assert isinstance(part(model, "fr").adapter.placed[0][1], Generated)
    with pytest.raises(inlay.CannotMerge, match="Generated is not a linear change"):
        inlay.merge(model)
