"""Prompt tuning on the contract: rows evaluated once, then keys and values of every attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_checks import (
    GREEDY,
    batch_for,
    build,
    check_base_unmoved,
    check_checkpointing,
    check_detach,
    check_gradients,
    check_round_trip,
    check_routing,
    logits,
    offered,
    padded,
    part,
    stir,
    uncached,
)
from rehearsal.hyperformer import Hyperformer
from rehearsal.prompt_tuning import PromptTuning
from torch import Tensor, nn

import inlay
from inlay.errors import TargetError
from inlay_lora import LoRA

METHOD = PromptTuning(length=4)
WORDS = torch.tensor([11, 7, 29, 50])


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    with offered(PromptTuning):
        yield


def prompt_of(model: nn.Module, name: str = "fr") -> nn.Parameter:
    found = part(model, name).adapter.placed[0][1].rows
    assert isinstance(found, nn.Parameter)
    return found


def really_prepended(model: nn.Module, batch: dict[str, Any], rows: Tensor) -> Tensor:
    """Return a plain model's logits with `rows` in its input, its positions shifted, its mask longer."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    embedded = model.get_input_embeddings()(ids)
    count, length = len(rows), len(ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0) + count
    out = model(
        inputs_embeds=torch.cat([rows.expand(length, -1, -1), embedded], dim=1),
        attention_mask=torch.cat([mask.new_ones(length, count), mask], dim=1),
        position_ids=torch.cat([torch.arange(count).expand(length, -1), positions], dim=1),
    )
    found: Tensor = out.logits[:, count:]
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_equals_really_prepended_rows(family: str, attention: str) -> None:
    model, reference = build(family), build(family)
    for m in (model, reference):
        m.set_attn_implementation(attention)
    inlay.attach(model, METHOD, "fr", seed=0)
    stir(model, "fr")
    full = batch_for(model)
    padding = padded(model, [7, 2, 5])
    padding["position_ids"] = (padding["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for batch in (full, padding):
        with torch.no_grad():
            wanted = really_prepended(reference, batch, prompt_of(model))
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        torch.testing.assert_close(logits(model, batch)[real], wanted[real], rtol=1e-5, atol=1e-5)
        plain = logits(reference, batch)
        assert (wanted - plain)[real].abs().max() > 1e-2


def test_equals_prepended_rows_under_other_adapters() -> None:
    """In a stack the rows, too, go through the LoRA."""
    model, reference = build("llama"), build("llama")
    inlay.attach(model, LoRA(rank=2) + METHOD, "fr", seed=0)
    stir(model, "fr")
    inlay.attach(reference, LoRA(rank=2), "fr", seed=0)
    stir(reference, "fr")
    (lora, prompt) = (p.adapter for p in (part(model, "fr/lora"), part(model, "fr/prompt_tuning")))
    twin = part(reference, "fr").adapter
    for (_, ours), (_, theirs) in zip(lora.placed, twin.placed, strict=True):
        theirs.load_state_dict(ours.state_dict())
    batch = batch_for(model)
    with torch.no_grad():
        wanted = really_prepended(reference, batch, prompt.placed[0][1].rows)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)


def test_gradient_equals_that_of_prepended_rows() -> None:
    model, reference = build("llama"), build("llama")
    inlay.attach(model, METHOD, "fr", seed=0)
    batch = batch_for(model, labels=True)
    model(**batch).loss.backward()
    rows = prompt_of(model).detach().clone().requires_grad_()
    found = really_prepended(reference, batch, rows)
    labels = batch["labels"][:, 1:].flatten()
    torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), labels).backward()
    torch.testing.assert_close(prompt_of(model).grad, rows.grad, rtol=1e-4, atol=1e-6)
    assert rows.grad is not None
    assert (rows.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}],
    ids=["greedy", "beams", "static", "uncached"],
)
def test_generation_with_real_words_as_prompt(options: dict[str, Any]) -> None:
    """Rows that are embeddings of words w: what the plain model makes of [w; text], left-padded."""
    model, reference = build("llama"), build("llama")
    inlay.attach(model, METHOD, "fr", seed=0)
    prompt_of(model).data.copy_(model.get_input_embeddings()(WORDS))
    lengths = [6, 2, 5]
    batch = padded(model, lengths)
    got = model.generate(**batch, max_new_tokens=6, **GREEDY, **options)[:, 6:]
    ids = batch["input_ids"]
    joined = torch.stack([
        torch.cat([ids[row, : 6 - n], WORDS, ids[row, 6 - n :]]) for row, n in enumerate(lengths)
    ])  # fmt: skip
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.long)], dim=1)
    wanted = reference.generate(input_ids=joined, attention_mask=mask, max_new_tokens=6, **GREEDY, **options)
    assert torch.equal(got, wanted[:, 10:])
    assert not torch.equal(got, reference.generate(**batch, max_new_tokens=6, **GREEDY, **options)[:, 6:])


def test_cached_generation_equals_uncached() -> None:
    model = build("llama")
    inlay.attach(model, METHOD, "fr", seed=0)
    stir(model, "fr", std=1.0)
    batch = padded(model, [6, 1, 5])
    got = model.generate(**batch, max_new_tokens=6, **GREEDY)[:, 6:]
    assert torch.equal(got, uncached(model, batch, 6))
    with inlay.use(model):
        assert not torch.equal(got, uncached(model, batch, 6))


def test_choosing_another_prompt_on_one_cache() -> None:
    """What is kept for a generation is kept per stack, not per place in a route."""
    from transformers import DynamicCache

    model = build("llama")
    for name in ("fr", "de"):
        inlay.attach(model, PromptTuning(length=3), name, seed=len(name))
        stir(model, name, seed=ord(name[0]), std=1.0)
    ids = batch_for(model)["input_ids"]
    cache = DynamicCache(config=model.config)
    with inlay.use(model, "fr"):
        logits(model, {"input_ids": ids[:, :4], "past_key_values": cache})
    fresh = copy.deepcopy(cache)
    with inlay.use(model, "de"):
        got = logits(model, {"input_ids": ids[:, 4:], "past_key_values": cache})
        assert torch.equal(got, logits(model, {"input_ids": ids[:, 4:], "past_key_values": fresh}))


def test_tasks_give_every_row_its_own_prompt() -> None:
    """A stack in which the rows pass through a method that reads the task: as if prepended row by row."""
    hyper = Hyperformer(tasks=3, reduction=8, embedding=4, hidden=6, projected=5)
    model, reference = build("llama"), build("llama")
    with offered(Hyperformer):
        inlay.attach(model, hyper + METHOD, "fr", seed=0)
        stir(model, "fr", std=0.2)
        inlay.attach(reference, hyper, "fr", seed=0)
        part(reference, "fr").adapter.shared.load_state_dict(part(model, "fr").adapter.shared.state_dict())
    batch, rows = batch_for(model), prompt_of(model, "fr/prompt_tuning")
    with inlay.route(model, "fr", tasks=[2, 0, 1]):
        got = logits(model, batch)
    with inlay.route(reference, "fr", tasks=[2, 0, 1]), torch.no_grad():
        wanted = really_prepended(reference, batch, rows)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_rows_run_once_per_generation() -> None:
    model = build("llama")
    inlay.attach(model, METHOD, "fr", seed=0)
    calls: list[int] = []
    part(model, "fr").adapter.placed[0][1].register_forward_hook(lambda *_: calls.append(1))
    model.generate(**padded(model, [4, 2]), max_new_tokens=5, **GREEDY)
    assert calls == [1]


def test_padding_side_does_not_matter() -> None:
    model = build("llama")
    inlay.attach(model, METHOD, "fr", seed=0)
    left, right = padded(model, [5, 3], left=True), padded(model, [5, 5], left=False)
    right["input_ids"][1, :3], right["attention_mask"][1, 3:] = left["input_ids"][1, 2:], 0
    right["input_ids"][0] = left["input_ids"][0]
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    a, b = logits(model, left)[1, 2:], logits(model, right)[1, :3]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_counts_and_starting_rows() -> None:
    model = build("llama")
    plan = inlay.attach(model, METHOD, "fr", seed=0)
    assert plan.parameters == 4 * 32
    table = model.get_input_embeddings().weight
    where = [(table == row).all(1).nonzero().flatten().tolist() for row in prompt_of(model)]
    assert all(len(w) == 1 for w in where)
    assert len({w[0] for w in where}) == 4
    inlay.attach(model, PromptTuning(length=200), "long", seed=0)
    assert len(prompt_of(model, "long")) == 200
    inlay.attach(model, PromptTuning(length=50, init="uniform"), "uniform", seed=0)
    rows = prompt_of(model, "uniform")
    assert 0.45 < rows.abs().max() <= 0.5
    assert abs(rows.mean()) < 0.05


def test_gradients_routing_detach_and_round_trip(tmp_path: Path) -> None:
    """Rows of one batch may have prompts of different lengths, or none."""
    model = build("llama")
    batch, labelled = padded(model, [7, 2, 5, 4]), batch_for(model, labels=True)
    check_detach(model, lambda: inlay.attach(model, METHOD, "fr", seed=0), batch)
    inlay.attach(model, METHOD, "fr", seed=0)
    check_gradients(model, "fr", labelled)
    check_base_unmoved(model, labelled)
    stir(model, "fr")
    check_round_trip(lambda: build("llama"), model, "fr", batch, tmp_path)
    inlay.attach(model, PromptTuning(length=7), "de", seed=1, activate=False)
    stir(model, "de", seed=2)
    check_routing(model, ["fr", None, "de", "fr"], batch)
    for options in ({}, {"num_beams": 2}):
        with inlay.route(model, ["de", None, "fr"]):
            together = model.generate(**padded(model, [6, 3, 5]), max_new_tokens=4, **GREEDY, **options)
        for row, name in enumerate(("de", None, "fr")):
            own = {k: v[row : row + 1] for k, v in padded(model, [6, 3, 5]).items()}
            with inlay.route(model, name):
                alone = model.generate(**own, max_new_tokens=4, **GREEDY, **options)
            assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """What the rows left at each layer is computed outside the blocks that are run again."""
    model = build("llama")
    inlay.attach(model, METHOD, "fr", seed=0)
    stir(model, "fr")
    batch = padded(model, [7, 3, 5])
    batch["labels"] = batch["input_ids"]
    check_checkpointing(model, batch, reentrant=reentrant)
    inlay.attach(model, LoRA(rank=2) + PromptTuning(length=2), "de", seed=1)
    stir(model, "de")
    check_checkpointing(model, batch, reentrant=reentrant, names=["fr", "de", None])


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_models_without_rotary_positions_are_refused(family: str) -> None:
    with pytest.raises(
        TargetError, match=f"this {type(build(family)).__name__} has no 'embedding' that prompt_tuning"
    ):
        inlay.attach(build(family), METHOD)
