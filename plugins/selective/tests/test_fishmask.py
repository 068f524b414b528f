"""FishMask: which entries are chosen, what they change, what an optimizer holds, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import CannotMerge, ConfigError, TargetError
from inlay.stack import need_state
from inlay.testing.effects import output
from inlay.testing.layers import deltas_of, fit, settled
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay.testing.snapshots import differences, snapshot
from inlay.testing.tools import distance, shake
from inlay_selective import FishMask

FAMILIES = ("llama", "qwen", "gpt2", "bert", "t5", "vit")
METHOD = FishMask(density=0.1)


def data_for(model: nn.Module, batches: int = 3, rows: int = 2) -> list[dict[str, Any]]:
    return [batch_for(model, rows=rows, seed=seed, labels=True) for seed in range(batches)]


def places(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Return the base's tensor and the flat places in it, as it is stored, by the adapter's label.

    A label is "<module>.weight" or ".bias", or for a bare tensor its name and ".weight"; places are those of
    (out, in), which Conv1D stores the other way round.
    """
    own, found = dict(model.named_parameters()), {}
    for label, flat in need_state(model).placed[0].adapter.calibration.items():
        name = label if label in own else label.rpartition(".")[0]
        flat, shape = flat.long(), own[name].shape
        if type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D" and len(shape) == 2:
            flat = flat % shape[0] * shape[1] + flat // shape[0]
        found[label] = (name, flat)
    return found


def entries(model: nn.Module) -> dict[str, Tensor]:
    """Return the flat places that learn, ascending, by the name of the base's tensor."""
    return {name: flat.sort().values for name, flat in places(model).values()}


def reference(
    model: nn.Module, data: list[dict[str, Any]], count: int, left_out: set[str]
) -> dict[str, Tensor]:
    """Return the `count` entries with the largest Σ g² over single samples, by plain torch.

    `left_out` names what learns whole or not at all. One long vector, sorted stably, as written.
    """
    scores = {n: torch.zeros(p.shape) for n, p in model.named_parameters() if n not in left_out}
    for batch in data:
        for row in range(len(next(iter(batch.values())))):
            model.zero_grad()
            model(**{k: v[row : row + 1] for k, v in batch.items()}).loss.backward()
            for name, parameter in model.named_parameters():
                if name in scores and parameter.grad is not None:
                    scores[name] += parameter.grad**2
    flat = torch.cat([s.view(-1) for s in scores.values()])
    chosen, start, found = flat.sort(descending=True, stable=True).indices[:count], 0, {}
    for name, score in scores.items():
        mine = chosen[(chosen >= start) & (chosen < start + score.numel())] - start
        start += score.numel()
        if len(mine):
            found[name] = mine.sort().values
    return found


def whole(family: str, model: nn.Module) -> set[str]:
    """Return the names of the tensors that learn whole (a new head), or, relative positions, not at all."""
    return {n for n, _ in model.named_parameters() if n.startswith("classifier") or "relative_" in n}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_entries_are_those_of_the_largest_fisher_information(family: str) -> None:
    model, other = settled(family), settled(family)
    data, left_out = data_for(model), whole(family, model)
    sizes = {n: p.numel() for n, p in other.named_parameters()}
    relative = sum(size for n, size in sizes.items() if "relative_" in n)
    head = sum(size for n, size in sizes.items() if n.startswith("classifier"))
    total = int(0.1 * (sum(sizes.values()) - relative))
    inlay.attach(model, METHOD, data=data)
    expected = reference(other, data, total - head, left_out)
    got = entries(model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert {n.rpartition(".")[2] for n in got} >= {"weight"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total


def written(family: str, model: nn.Module) -> nn.Module:
    """Return a plain model whose own tensors hold what the adapter learnt, written entry by entry."""
    plain, deltas = settled(family), deltas_of(model)
    own = dict(plain.named_parameters())
    for label, (name, flat) in places(model).items():
        path, _, tensor = label.rpartition(".")
        own[name].view(-1)[flat] += getattr(deltas[path], tensor).values
    for path, delta in deltas.items():
        if delta.replaces:
            plain.get_submodule(path).weight.copy_(delta.weight)
            plain.get_submodule(path).bias.copy_(delta.bias)
    return plain


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_output_is_that_of_a_model_with_the_entries_changed(family: str) -> None:
    """Weights, biases, norms, embeddings, tied tables, bare tensors and the head: all of them."""
    model = settled(family)
    data = data_for(model)
    base = output(model)
    with torch.enable_grad():
        inlay.attach(model, METHOD, data=data)
    assert torch.equal(output(model), base)
    shake(model)
    expected = output(written(family, model))
    assert distance(output(model), expected) < 1e-6
    assert distance(base, expected) > 0.05
    kinds = {site.kind for site, _ in need_state(model).placed[0].adapter.placed}
    assert len(kinds) >= 3


def test_training_is_that_of_the_whole_model_under_a_mask() -> None:
    """AdamW without decay on dense gradients times the mask gives the same weights (catalogue, form F1)."""
    model, dense = settled("bert"), settled("bert")
    data = data_for(model)
    inlay.attach(model, METHOD, data=data)
    masks = {n: torch.zeros(p.shape) for n, p in dense.named_parameters()}
    for name, flat in entries(model).items():
        masks[name].view(-1)[flat] = 1
    for name in ("classifier.weight", "classifier.bias"):
        masks[name].fill_(1)
    one = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-2))
    two = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(5):
        for net, optimizer in ((model, one), (dense, two)):
            optimizer.zero_grad()
            net(**batch_for(net, seed=step, labels=True)).loss.backward()
            if net is dense:
                for name, parameter in dense.named_parameters():
                    parameter.grad *= masks[name]
            optimizer.step()
    inlay.check_training(model, one)
    with torch.no_grad():
        inlay.merge(model, undo=False)
    for (name, merged), (_, expected) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        assert torch.allclose(merged, expected, atol=1e-6), name
        assert torch.equal(merged[masks[name] == 0], expected[masks[name] == 0]), name


def test_an_optimizer_holds_two_numbers_per_chosen_entry() -> None:
    model = build("bert")
    total = int(0.1 * sum(p.numel() for p in model.parameters()))
    inlay.attach(model, METHOD, data=data_for(model))
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    model(**batch_for(model, labels=True)).loss.backward()
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    assert sum(t.numel() for t in held) == 2 * total
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_merging_writes_the_entries_and_nothing_else() -> None:
    model, before = settled("vit"), settled("vit")
    inlay.attach(model, METHOD, data=data_for(model))
    shake(model)
    chosen, adapted = entries(model), output(model)
    inlay.merge(model, undo=False)
    assert distance(output(model), adapted) < 1e-6
    for (name, now), (_, base) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        changed = (now != base).view(-1).nonzero()[:, 0]
        if not name.startswith("classifier"):
            assert set(changed.tolist()) <= set(chosen.get(name, torch.empty(0)).tolist()), name
    assert type(model) is type(before)


# -- heads, ties, stacks -------------------------------------------------------------------------


def test_a_new_head_learns_whole_and_a_language_model_s_is_chosen_from() -> None:
    bert, llama = build("bert"), build("llama")
    for model in (bert, llama):
        inlay.attach(model, METHOD, data=data_for(model))
    assert deltas_of(bert)["classifier"].weight.shape == (3, 32)
    assert "classifier.weight" not in need_state(bert).placed[0].adapter.calibration
    assert 0 < len(entries(llama)["lm_head.weight"]) < 64 * 32


def test_a_tied_table_has_one_set_of_values_for_both_its_uses() -> None:
    model = settled("gpt2")
    inlay.attach(model, METHOD, data=data_for(model))
    values = deltas_of(model)["transformer.wte"].weight.values
    names = [n for n, p in model.named_parameters() if p is values]
    assert names == ["transformer.wte.inlay.0.0.weight.values"]
    before = output(model)
    with inlay.use(model), torch.no_grad():
        hidden = model.transformer(**batch_for(model)).last_hidden_state
    model.lm_head(hidden).sum().backward()
    assert values.grad is not None
    assert values.grad.abs().sum() > 0
    shake(model)
    assert distance(output(model), before) > 0.05
    with pytest.raises(CannotMerge, match="its storage is tied to"):
        inlay.merge(model)


def test_relative_positions_are_left_out_and_cannot_be_named() -> None:
    model = build("t5")
    inlay.attach(model, METHOD, data=data_for(model))
    assert not [name for name in entries(model) if "relative" in name]
    with refused(TargetError, "fishmask does not suit what .* names[\\s\\S]*relative positions no rows"):
        inlay.plan(model, FishMask(targets=["relative_attention_bias"]))


def test_targets_and_layers_limit_both_the_choice_and_the_share() -> None:
    model = build("bert")
    inlay.attach(model, FishMask(density=0.1, targets=["ffn", "norm"], layers=[1]), data=data_for(model))
    names = set(entries(model))
    assert names
    assert all(name.startswith("bert.encoder.layer.1.") for name in names)
    total = 2 * 32 * 48 + 48 + 32 + 2 * 2 * 32
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == int(0.1 * total)


def test_the_choice_is_made_on_the_bare_model_in_evaluation_mode() -> None:
    """Other adapters, dropout and the base's own flags and gradients play no part, and stay."""
    plain, model = settled("bert"), settled("bert", hidden_dropout_prob=0.5)
    data = data_for(plain)
    model(**data[0])  # notes the kind of its labels in its configuration
    inlay.attach(plain, METHOD, data=data)
    inlay.attach(model, "bitfit", name="before")
    shake(model, size=2.0)
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.ones_like(parameter)
    model.train()
    model.bert.pooler.eval()
    before = snapshot(model)
    inlay.attach(model, METHOD, name="fr", data=data)
    found = need_state(model).adapter_of("fr").calibration
    expected = need_state(plain).adapter_of("default").calibration
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in found)
    inlay.detach(model, "fr")
    assert differences(before, model) == []
    assert model.training
    assert not model.bert.pooler.training


def test_an_iterator_serves_every_part_of_a_stack() -> None:
    model = build("bert")
    encoder, ffn = (FishMask(density=0.05, targets=[t]).named(t) for t in ("attention", "ffn"))
    inlay.attach(model, encoder + ffn, data=iter(data_for(model)))
    kept = [placed.adapter.calibration for placed in need_state(model).placed.values()]
    assert [len(k) > 0 for k in kept] == [True, True]


def test_adapters_of_one_choice_combine_and_others_do_not() -> None:
    model = settled("bert")
    data = data_for(model)
    for name in ("fr", "de"):
        inlay.attach(model, METHOD, name=name, data=data)
    shake(model)
    inlay.combine(model, {"fr": 0.5, "de": 0.5}, name="mix", how="tensors", activate=True)
    one, two, mix = (deltas_of(model, n)["bert.pooler.dense"].weight.values for n in ("fr", "de", "mix"))
    torch.testing.assert_close(mix, (one + two) / 2)
    inlay.attach(model, METHOD, name="it", data=[batch_for(model, seed=9, labels=True)])
    with refused(ConfigError, "adapters of different calibration cannot be combined", model=model):
        inlay.combine(model, {"fr": 0.5, "it": 0.5}, name="mixed", how="tensors")


def test_it_learns() -> None:
    model = build("bert")
    batch = batch_for(model, rows=8, labels=True)
    inlay.attach(model, METHOD, data=[batch], seed=0)
    before, after = fit(model, batch)
    assert after < 0.2 * before
