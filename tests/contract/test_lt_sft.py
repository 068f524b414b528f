"""LT-SFT on the contract: stages that change what an adapter owns, compact values, saved counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_checks import (
    batch_for,
    build,
    check_base_unmoved,
    check_detach,
    check_gradients,
    check_round_trip,
    check_routing,
    gradients,
    logits,
    offered,
    part,
    stir,
)
from rehearsal.lt_sft import LTSFT
from torch import Tensor, nn

import inlay
from inlay.authoring.trained import shapes
from inlay.errors import CheckpointError, StateError

METHOD = LTSFT(count=40, targets=("embedding", "query", "down"), l1=0.0)


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    with offered(LTSFT):
        yield


def values(model: nn.Module, name: str = "fr") -> dict[str, Tensor]:
    """Return every difference from the base as a dense tensor, by the base's own parameter names."""
    found = {}
    for site, delta in part(model, name).adapter.placed:
        for kind, shape in zip(("weight", "bias"), shapes(site), strict=True):
            change = delta.change(kind)
            if change is not None:
                dense = change if isinstance(change, Tensor) else change.dense(torch.zeros(shape))
                found[f"{site.name}.{kind}"] = dense.detach().clone()
    return found


def tickets(model: nn.Module, seed: int = 0, *, method: LTSFT = METHOD) -> dict[str, Tensor]:
    """Attach, move everything, and return the dense differences of the first stage."""
    inlay.attach(model, method, "fr", seed=seed)
    stir(model, "fr", seed=seed)
    return values(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_both_stages_match_weights_written_into_a_plain_model(family: str) -> None:
    untied = {"tie_word_embeddings": False} if family == "gpt2" else {}
    model = build(family, **untied)
    batch = batch_for(model)
    plain = logits(model, batch)
    inlay.attach(model, METHOD, "fr", seed=0)
    assert torch.equal(logits(model, batch), plain)
    for stage in ("full", "sparse"):
        stir(model, "fr", std=2.0)
        reference = build(family, **untied)
        for name, change in values(model).items():
            tensor = reference.get_parameter(name.replace("[query]", "")).data
            fused = tensor[..., :32] if "[query]" in name else tensor
            fused += change.mT if "c_" in name and change.dim() == 2 else change
        torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-5, atol=1e-5)
        assert (logits(model, batch) - plain).abs().max() > 1e-3
        assert inlay.advance(model, "fr") == {"full": "sparse", "sparse": None}[stage]


def test_the_largest_entries_are_kept_and_everything_is_rewound() -> None:
    model = build("llama")
    batch = batch_for(model)
    plain = logits(model, batch)
    moved = tickets(model)
    assert [s.name for s in inlay.stages(model, "fr")] == ["full", "sparse"]
    assert inlay.advance(model, "fr") == "sparse"
    assert [s.name for s in inlay.stages(model, "fr")] == ["sparse"]
    assert torch.equal(logits(model, batch), plain)
    for _, parameter in part(model, "fr").adapter.named_parameters():
        torch.nn.init.ones_(parameter)
    kept = torch.cat([t.flatten() for t in values(model).values()])
    threshold = torch.cat([t.abs().flatten() for t in moved.values()]).sort(descending=True).values[39]
    wanted = torch.cat([(t.abs() >= threshold).float().flatten() for t in moved.values()])
    assert int(kept.sum()) == 40
    assert torch.equal(kept, wanted)


def test_ties_go_to_the_first_entries() -> None:
    """All differences equal: exactly K are kept, the lowest flat indices of the first tensors."""
    model = build("llama")
    inlay.attach(model, LTSFT(count=70, targets=("query",)), "fr", seed=0)
    for _, parameter in part(model, "fr").adapter.named_parameters():
        torch.nn.init.constant_(parameter, -0.5)
    inlay.advance(model, "fr")
    first, second = (delta for _, delta in part(model, "fr").adapter.placed)
    assert first.weight_indices.tolist() == list(range(70))
    assert second.weight is None


def test_the_optimizer_holds_two_numbers_per_kept_entry() -> None:
    model = build("llama")
    batch = batch_for(model, labels=True)
    tickets(model)
    inlay.advance(model, "fr")
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    gradients(model, batch)
    optimizer.step()
    inlay.check_training(model, optimizer)
    state = [t for entry in optimizer.state.values() for t in entry.values() if t.dim()]
    assert sum(t.numel() for t in state) == 2 * 40


def test_second_stage_equals_masked_dense_gradients() -> None:
    """The oracle: train the base itself with AdamW, weight decay 0 and the gradient masked (form F1)."""
    model, oracle = build("llama"), build("llama")
    batch = batch_for(model, labels=True)
    tickets(model)
    inlay.advance(model, "fr")
    stir(model, "fr")
    mask = {n: t != 0 for n, t in values(model).items()}
    with torch.no_grad():
        for _, parameter in part(model, "fr").adapter.named_parameters():
            parameter.zero_()
    ours = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-2))
    chosen = {n: oracle.get_parameter(n) for n in mask}
    theirs = torch.optim.AdamW(chosen.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        gradients(model, batch)
        ours.step()
        oracle.zero_grad()
        oracle(**batch).loss.backward()
        for name, parameter in chosen.items():
            parameter.grad *= mask[name]
        theirs.step()
    start = build("llama")
    for name, change in values(model).items():
        torch.testing.assert_close(start.get_parameter(name) + change, chosen[name], rtol=0, atol=1e-6)
    assert sum(int((change != 0).sum()) for change in values(model).values()) <= 40


def test_regulariser() -> None:
    """A uniform shift c of n of N parameters costs λ·c·n/N; adapters attached before do not count in N."""
    model = build("llama")
    total = sum(p.numel() for p in model.parameters())
    inlay.attach(model, METHOD, "before", seed=0)
    inlay.attach(model, LTSFT(targets=("query",), l1=0.1), "fr", seed=0)
    for _, parameter in part(model, "fr").adapter.named_parameters():
        torch.nn.init.constant_(parameter, -0.25)
    wanted = 0.1 * 0.25 * (2 * 32 * 32) / total
    torch.testing.assert_close(inlay.auxiliary_loss(model), torch.tensor(wanted))


@pytest.mark.parametrize("stage", ["full", "sparse"])
def test_gradients_round_trip_and_merge(stage: str, tmp_path: Path) -> None:
    """Loading rebuilds the compact form, with the right sizes, from what `adapter.data` says."""
    model = build("llama")
    batch = batch_for(model)
    labelled = {"input_ids": torch.arange(3, 63).view(3, 20), "labels": torch.arange(3, 63).view(3, 20)}
    tickets(model)
    if stage == "sparse":
        inlay.advance(model, "fr")
        stir(model, "fr")
    check_gradients(model, "fr", labelled)
    check_base_unmoved(model, labelled)
    fresh = check_round_trip(lambda: build("llama"), model, "fr", batch, tmp_path)
    assert [s.name for s in inlay.stages(fresh, "fr")] == ["full", "sparse"][stage == "sparse" :]
    size = sum(p.numel() for _, p in part(fresh, "fr").adapter.named_parameters())
    assert size == (40 if stage == "sparse" else sum(t.numel() for t in values(fresh).values()))
    applied = logits(fresh, batch)
    inlay.merge(fresh)
    torch.testing.assert_close(logits(fresh, batch), applied, rtol=1e-5, atol=1e-5)
    inlay.unmerge(fresh)
    assert torch.equal(logits(fresh, batch), applied)


def test_composition_is_addition() -> None:
    """Task and language: θ0 + φ_T + φ_L, in either order."""
    one, two = build("llama"), build("llama")
    batch = batch_for(one)
    for model, order in ((one, ("fr", "ner")), (two, ("ner", "fr"))):
        for name in order:
            inlay.attach(model, METHOD, name, seed=0)
            stir(model, name, seed=len(name))
            inlay.advance(model, name)
            stir(model, name, seed=5 + len(name))
    torch.testing.assert_close(logits(one, batch), logits(two, batch), rtol=1e-5, atol=1e-6)


def test_detach_and_routing() -> None:
    model = build("llama")
    batch = batch_for(model, rows=4)

    def both_stages() -> None:
        tickets(model)
        inlay.advance(model, "fr")

    check_detach(model, both_stages, batch)
    both_stages()
    stir(model, "fr", std=1.0)
    inlay.attach(model, LTSFT(count=30), "de", seed=1)
    stir(model, "de", std=1.0, seed=2)
    check_routing(model, ["fr", None, "de", "fr"], batch)


def test_keeping_all_is_full_training_from_the_start_again() -> None:
    model = build("llama")
    tickets(model, method=LTSFT(density=1.0, targets=("query",)))
    inlay.advance(model, "fr")
    for _, delta in part(model, "fr").adapter.placed:
        assert delta.weight_indices.tolist() == list(range(32 * 32))
        assert not delta.weight.any()


def test_advance_without_stages_or_while_merged_is_refused() -> None:
    model = build("llama")
    inlay.attach(model, "trained", "head")
    with pytest.raises(StateError, match="'head' has no stage left to end"):
        inlay.advance(model, "head")
    inlay.attach(model, METHOD, "fr")
    inlay.merge(model)
    with pytest.raises(StateError, match="advance is undefined while adapters are merged"):
        inlay.advance(model, "fr")


@pytest.mark.parametrize("kept", [[[1 << 40, None]] * 2, [[3, None]] * 2, [[5, None]], "x", [[-1, None]] * 2])
def test_a_manifest_with_other_counts_is_refused(kept: Any, tmp_path: Path) -> None:
    """Counts from a file are not believed: what they would make must be what the tensors' header says."""
    import json

    model = build("llama")
    tickets(model, method=LTSFT(count=40, targets=("query",)))
    inlay.advance(model, "fr")
    inlay.save(model, tmp_path, "fr")
    file = tmp_path / "inlay.json"
    content = json.loads(file.read_text())
    content["parts"][0]["data"]["kept"] = kept
    file.write_text(json.dumps(content))
    fresh = build("llama")
    with pytest.raises(CheckpointError):
        inlay.load(fresh, tmp_path, "fr")
