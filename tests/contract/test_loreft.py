"""LoReFT on the contract: edits of block outputs at prompt positions, in prefill only."""

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
    check_base_unmoved,
    check_checkpointing,
    check_detach,
    check_gradients,
    check_round_trip,
    check_routing,
    gradients,
    logits,
    offered,
    padded,
    part,
    stir,
)
from rehearsal.loreft import LoReFT, chosen
from torch import Tensor, nn

import inlay
from inlay.context import At, Slot

METHOD = LoReFT(rank=3, first=2, last=1)


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    with offered(LoReFT):
        yield


def blocks_of(model: nn.Module) -> list[nn.Module]:
    found = [m for _, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2]
    return list(found[0])


def edited(model: nn.Module, batch: dict[str, Any], adapter: nn.Module, positions: list[list[int]]) -> Tensor:
    """Run a bare model with plain hooks that edit rows of hidden states at `positions`."""
    handles = []
    for block, (_, delta) in zip(blocks_of(model), adapter.placed, strict=True):  # type: ignore[arg-type]

        def hook(module: nn.Module, args: Any, output: Any, delta: Any = delta) -> Any:
            h = (output[0] if isinstance(output, tuple) else output).clone()
            R = delta.rotation()
            for row, where in enumerate(positions):
                for t in where:
                    h[row, t] = h[row, t] + R.T @ (delta.weight @ h[row, t] + delta.bias - R @ h[row, t])
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handles.append(block.register_forward_hook(hook))
    try:
        return logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_matches_hooks_that_edit_first_and_last_positions(family: str) -> None:
    model, reference = build(family), build(family)
    batch = batch_for(model, length=7)
    inlay.attach(model, METHOD, "fr", seed=0)
    stir(model, "fr")
    wanted = edited(reference, batch, part(model, "fr").adapter, [[0, 1, 6]] * 3)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits(reference, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("left", [True, False])
def test_positions_count_from_each_rows_own_prompt(left: bool) -> None:
    """Padded rows, with the half rule where n < first + last."""
    model, reference = build("llama"), build("llama")
    lengths = [7, 2, 1, 4]
    batch = padded(model, lengths, left=left)
    inlay.attach(model, METHOD, "fr", seed=0)
    stir(model, "fr")
    inside = [[0, 1, 6], [0, 1], [], [0, 1, 3]]
    shift = [7 - n if left else 0 for n in lengths]
    positions = [[t + s for t in where] for where, s in zip(inside, shift, strict=True)]
    wanted = edited(reference, batch, part(model, "fr").adapter, positions)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)


def test_half_rule() -> None:
    prompt = torch.ones(1, 5, dtype=torch.bool)
    assert chosen(prompt, 7, 7).tolist() == [[True, True, False, True, True]]
    assert chosen(prompt[:, :1], 7, 7).tolist() == [[False]]
    assert chosen(prompt, 1, 0).tolist() == [[True, False, False, False, False]]


def test_labels_end_the_prompt_in_training() -> None:
    """Rows of prompt and answer: what is edited is the end of the prompt, not of the sequence."""
    model, reference = build("llama"), build("llama")
    batch = batch_for(model, length=7)
    labels = batch["input_ids"].clone()
    labels[0, :4], labels[1, :6] = -100, -100
    inlay.attach(model, METHOD, "fr", seed=0)
    stir(model, "fr")
    wanted = edited(reference, batch, part(model, "fr").adapter, [[0, 1, 3], [0, 1, 5], [0, 1, 6]])
    torch.testing.assert_close(logits(model, {**batch, "labels": labels}), wanted, rtol=1e-5, atol=1e-5)


def test_rows_are_orthonormal_after_training_and_edits_lie_in_their_span() -> None:
    model = build("llama")
    batch = batch_for(model, labels=True)
    inlay.attach(model, METHOD, "fr", seed=0)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=0.05))
    for _ in range(3):
        gradients(model, batch)
        optimizer.step()
    for site, delta in part(model, "fr").adapter.placed:
        R = delta.rotation()
        torch.testing.assert_close(R @ R.T, torch.eye(3), rtol=0, atol=1e-5)
        h = torch.randn(1, 6, site.features)
        after = h + delta(h, h, At(site, Slot(), part(model, "fr"), None))
        change = after - h
        torch.testing.assert_close(change @ R.T @ R, change, rtol=1e-4, atol=1e-5)
        where = [0, 1, 5]
        torch.testing.assert_close(
            after[0, where] @ R.T, h[0, where] @ delta.weight.T + delta.bias, rtol=1e-4, atol=1e-5
        )
        assert torch.equal(after[0, 2:5], h[0, 2:5])


def test_identity_start_and_counts() -> None:
    model = build("llama")
    batch = batch_for(model)
    plain = logits(model, batch)
    plan = inlay.attach(model, LoReFT(rank=3, start="identity"), "fr", seed=0)
    torch.testing.assert_close(logits(model, batch), plain, rtol=1e-6, atol=1e-6)
    assert plan.parameters == 2 * (2 * 32 * 3 + 3)
    untied = inlay.attach(model, LoReFT(rank=3, tied=False), "de", seed=0)
    assert untied.parameters == 2 * plan.parameters
    with torch.device("meta"):
        wide = build("llama", hidden_size=4096, num_hidden_layers=1)
    assert inlay.plan(wide, LoReFT(rank=4)).parameters == 32_772


def test_untied_edits_equal_tied_ones_with_the_same_values() -> None:
    """Two deltas of one adapter at one site."""
    model = build("llama")
    batch = batch_for(model)
    inlay.attach(model, METHOD, "tied", seed=0)
    stir(model, "tied")
    inlay.attach(model, LoReFT(rank=3, first=2, last=1, tied=False), "untied", seed=0)
    both = {s.name: d for s, d in part(model, "tied").adapter.placed}
    for site, delta in part(model, "untied").adapter.placed:
        delta.load_state_dict(both[site.name].state_dict())
    with inlay.use(model, "tied"):
        wanted = logits(model, batch)
    with inlay.use(model, "untied"):
        torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["greedy", "beams", "static"],
)
def test_generation_edits_the_prompt_once(options: dict[str, Any]) -> None:
    """Decode steps run bare: generation equals one where only the prompt's blocks were edited."""
    model, reference = build("llama"), build("llama")
    lengths = [6, 3, 5]
    batch = padded(model, lengths)
    inlay.attach(model, METHOD, "fr", seed=0)
    stir(model, "fr", std=1.0)
    got = model.generate(**batch, max_new_tokens=5, **GREEDY, **options)
    positions = [sorted({6 - n, 6 - n + min(1, n // 2 - 1), 5}) for n in lengths]
    beams = options.get("num_beams", 1)
    handles = []
    for block, (_, delta) in zip(blocks_of(reference), part(model, "fr").adapter.placed, strict=True):

        def hook(module: nn.Module, args: Any, output: Tensor, delta: Any = delta) -> Tensor:
            h, R = output.clone(), delta.rotation()
            for row in range(len(h)) if h.shape[1] > 1 else ():
                for t in positions[row // beams]:
                    h[row, t] = h[row, t] + R.T @ (delta.weight @ h[row, t] + delta.bias - R @ h[row, t])
            return h

        handles.append(block.register_forward_hook(hook))
    assert torch.equal(got, reference.generate(**batch, max_new_tokens=5, **GREEDY, **options))
    for handle in handles:
        handle.remove()
    assert not torch.equal(got, reference.generate(**batch, max_new_tokens=5, **GREEDY, **options))


def test_generation_routed_per_sample_equals_alone() -> None:
    model = build("llama")
    batch = padded(model, [6, 3, 5])
    inlay.attach(model, METHOD, "fr", seed=0)
    inlay.attach(model, LoReFT(rank=2, first=1, last=2), "de", seed=1)
    stir(model, "fr", std=1.0)
    stir(model, "de", seed=2, std=1.0)
    names = ["de", None, "fr"]
    for options in ({}, {"num_beams": 2}):
        with inlay.route(model, names):
            together = model.generate(**batch, max_new_tokens=4, **GREEDY, **options)
        for row, name in enumerate(names):
            with inlay.route(model, name):
                own = {k: v[row : row + 1] for k, v in batch.items()}
                alone = model.generate(**own, max_new_tokens=4, **GREEDY, **options)
            assert torch.equal(together[row], alone[0]), (name, options)


def test_gradients_routing_detach_and_round_trip(tmp_path: Path) -> None:
    model = build("llama")
    batch, labelled = padded(model, [7, 2, 5, 4]), batch_for(model, labels=True)
    check_detach(model, lambda: inlay.attach(model, METHOD, "fr", seed=0), batch)
    inlay.attach(model, METHOD, "fr", seed=0)
    check_gradients(model, "fr", labelled)
    check_base_unmoved(model, labelled)
    stir(model, "fr")
    check_round_trip(lambda: build("llama"), model, "fr", batch, tmp_path)
    inlay.attach(model, LoReFT(rank=2, first=1, last=2), "de", seed=1, activate=False)
    stir(model, "de", seed=2)
    check_routing(model, ["fr", None, "de", "fr"], batch)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_positions(reentrant: bool) -> None:
    """`use_cache` is on while blocks run again, and the mask is read a second time."""
    model = build("llama")
    inlay.attach(model, METHOD, "fr", seed=0)
    stir(model, "fr")
    batch = padded(model, [7, 3, 5])
    check_checkpointing(model, {**batch, "labels": batch["input_ids"]}, reentrant=reentrant)
    inlay.attach(model, LoReFT(rank=2), "de", seed=1)
    check_checkpointing(
        model, {**batch, "labels": batch["input_ids"]}, reentrant=reentrant, names=["fr", "de", None]
    )


def test_encoder_of_t5_is_edited_and_its_decoder_is_not() -> None:
    model, reference = build("t5"), build("t5")
    plan = inlay.attach(model, METHOD, "fr", seed=0)
    assert {s.side for s in plan.parts[0].sites} == {"encoder"}
    stir(model, "fr")
    batch = padded(model, [7, 3], left=False)
    batch["labels"] = batch_for(model, rows=2, length=4)["labels"]
    wanted = edited(reference, batch, part(model, "fr").adapter, [[0, 1, 6], [0, 2]])
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert model.generate(input_ids=batch["input_ids"], max_new_tokens=3).shape[0] == 2
