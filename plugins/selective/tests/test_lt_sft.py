"""LT-SFT: both stages by plain torch, what is kept and put back, rounds, composition, files, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.authoring import Compact
from inlay.authoring.sparse import Entries, distinct, places
from inlay.errors import ConfigError
from inlay.stack import Placed, need_state
from inlay.testing.effects import output
from inlay.testing.folders import edit
from inlay.testing.layers import fit, settled
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay.testing.tools import distance, shake
from inlay_selective import LTSFT

TARGETS = ("embedding", "query", "down")
METHOD = LTSFT(count=40, targets=TARGETS)


def part(model: nn.Module, name: str = "default") -> Placed:
    return need_state(model).find(name)[0]


def values(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return every difference from the base as a dense tensor, by the base's own parameter names."""
    adapter, found = part(model, name).adapter, {}
    shapes = {p.label: p.shape for p in distinct(places(adapter.sites))}
    for local, delta in adapter.modules():
        for kind, entries in delta.named_children():
            assert isinstance(entries, Entries)
            change, zero = entries(), torch.zeros(shapes[f"{local}.{kind}"])
            dense = zero if change is None else change.dense(zero) if isinstance(change, Compact) else change
            found[f"{local}.{kind}"] = dense.detach().clone()
    return found


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    (model(**batch_for(model, seed=seed, labels=True)).loss + inlay.auxiliary_loss(model)).backward()
    inlay.check_training(model, optimizer)
    optimizer.step()


def learn(model: nn.Module, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-2))
    for number in range(steps):
        step(model, optimizer, number)


def test_both_stages_are_full_tuning_then_masked_tuning_of_the_base_itself() -> None:
    """The oracle trains the weights: AdamW and the penalty on all, the top K, back, gradients masked."""
    strength = 3.0
    model = settled("llama")
    size = sum(p.numel() for p in model.parameters())
    inlay.attach(model, LTSFT(count=40, targets=TARGETS, penalty=strength))
    learn(model)
    oracle, start = settled("llama"), settled("llama")
    names = {label: label for label in values(model)}
    chosen = {n: oracle.get_parameter(n) for n in names}
    mask = {n: torch.ones_like(p) for n, p in chosen.items()}

    def tune() -> None:
        optimizer = torch.optim.AdamW(chosen.values(), lr=1e-2, weight_decay=0.0)
        for number in range(4):
            oracle.zero_grad()
            moved = sum((p - start.get_parameter(n).detach()).abs().sum() for n, p in chosen.items())
            loss = oracle(**batch_for(oracle, seed=number, labels=True)).loss
            (loss + strength / size * moved).backward()
            for name, parameter in chosen.items():
                parameter.grad *= mask[name]
            optimizer.step()

    def same() -> None:
        for name, change in values(model).items():
            wanted = chosen[name].detach() - start.get_parameter(name).detach()
            torch.testing.assert_close(change, wanted, rtol=1e-3, atol=2e-6)

    tune()
    same()
    moved = {n: (p - start.get_parameter(n)).detach().abs() for n, p in chosen.items()}
    threshold = torch.cat([m.flatten() for m in moved.values()]).sort(descending=True).values[39]
    with torch.no_grad():
        for name, parameter in chosen.items():
            mask[name] = (moved[name] >= threshold).float()
            parameter.copy_(start.get_parameter(name))
    plain = output(settled("llama"))
    assert inlay.advance(model, "default") == "sparse 1"
    assert torch.equal(output(model), plain), "put back to the start, bit for bit"
    assert sum(int(m.sum()) for m in mask.values()) == 40
    tune()
    learn(model)
    same()
    changed = values(model)
    assert all(not change[mask[n] == 0].any() for n, change in changed.items())
    assert sum(int(change.count_nonzero()) for change in changed.values()) == 40
    assert distance(output(model), output(oracle)) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_both_stages_match_weights_written_into_a_plain_model(family: str) -> None:
    untied: dict[str, Any] = {"tie_word_embeddings": False} if family == "gpt2" else {}
    model = build(family, **untied)
    plain = output(model)
    inlay.attach(model, METHOD)
    assert torch.equal(output(model), plain)
    for stage in ("full 1", "sparse 1"):
        assert inlay.stages(model, "default")[0].name == stage
        shake(model, size=2.0)
        reference = build(family, **untied)
        for name, change in values(model).items():
            tensor = reference.get_parameter(name.replace("[query]", "")).data
            fused = tensor[..., :32] if "[query]" in name else tensor
            fused += change.mT if "c_" in name and change.dim() == 2 else change
        torch.testing.assert_close(output(model), output(reference), rtol=1e-5, atol=1e-5)
        assert (output(model) - plain).abs().max() > 1e-3
        inlay.advance(model, "default") if stage == "full 1" else None


def test_ties_go_to_the_first_entries() -> None:
    """All differences equal: exactly K are kept, the lowest flat places of the first tensors."""
    model = build("llama")
    inlay.attach(model, LTSFT(count=70, targets=("query",)))
    for _, parameter in part(model).adapter.named_parameters():
        nn.init.constant_(parameter, -0.5)
    inlay.advance(model, "default")
    (first, places) = next(iter(part(model).adapter.calibration.items()))
    assert len(part(model).adapter.calibration) == 1
    assert first.startswith("model.layers.0.")
    assert places.tolist() == list(range(70))


def test_the_optimizer_holds_two_numbers_for_each_entry() -> None:
    model = build("llama")
    inlay.attach(model, METHOD)
    learn(model, 1)
    inlay.advance(model, "default")
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    step(model, optimizer, 0)
    state = [t for entry in optimizer.state.values() for t in entry.values() if t.dim()]
    assert sum(t.numel() for t in state) == 2 * 40
    assert inlay.summary(model).trainable == 40


def test_rounds_are_nested_and_go_on_from_the_last_one() -> None:
    """Of 41 entries in 3 rounds 13, 27 and 41 are kept; each keeps what the one before trained."""
    model = build("llama")
    inlay.attach(model, LTSFT(count=41, rounds=3, targets=("query", "down")))
    assert [s.name for s in inlay.stages(model, "default")] == [
        "full 1", "sparse 1", "full 2", "sparse 2", "full 3", "sparse 3",
    ]  # fmt: skip
    before: dict[str, Tensor] = {}
    earlier: dict[str, set[int]] = {}
    for number, count in ((1, 13), (2, 27), (3, 41)):
        learn(model)
        assert inlay.advance(model, "default") == f"sparse {number}"
        now = values(model)
        if before:
            assert all(torch.equal(now[n], before[n]) for n in now), "put back to where the round began"
        learn(model)
        before = values(model)
        kept = {n: set(i.tolist()) for n, i in part(model).adapter.calibration.items()}
        assert sum(map(len, kept.values())) == count
        for name, change in before.items():
            assert set(change.flatten().nonzero()[:, 0].tolist()) == kept.get(name, set())
        assert all(old <= kept[n] for n, old in earlier.items())
        earlier = kept
        if number < 3:
            acted = output(model)
            assert inlay.advance(model, "default") == f"full {number + 1}"
            torch.testing.assert_close(output(model), acted)


def test_keeping_all_is_full_training_from_the_start_again() -> None:
    model = build("llama")
    inlay.attach(model, LTSFT(density=1.0, targets=("query",)))
    learn(model, 1)
    inlay.advance(model, "default")
    indices = part(model).adapter.calibration
    assert [i.tolist() for i in indices.values()] == [list(range(32 * 32))] * 2
    assert not any(change.any() for change in values(model).values())


def test_the_penalty() -> None:
    """A uniform shift c of n of N parameters costs λ·c·n / N; adapters attached before do not count in N."""
    model = build("llama")
    total = sum(p.numel() for p in model.parameters())
    inlay.attach(model, METHOD, "before")
    inlay.attach(model, LTSFT(targets=("query",), penalty=0.1), "fr")
    for _, parameter in part(model, "fr").adapter.named_parameters():
        nn.init.constant_(parameter, -0.25)
    wanted = 0.1 * 0.25 * (2 * 32 * 32) / total
    torch.testing.assert_close(inlay.auxiliary_loss(model), torch.tensor(wanted))
    inlay.advance(model, "fr")
    assert float(inlay.auxiliary_loss(model).detach()) == 0


def test_a_task_on_a_language_and_another_language_below_it() -> None:
    """A task's δ is trained on top of its language's; the sum does not depend on the order."""

    def sparse(model: nn.Module, name: str, seed: int) -> None:
        inlay.attach(model, METHOD, name)
        shake(model, name, seed=seed)
        inlay.advance(model, name)
        shake(model, name, seed=seed + 1, size=1.0)

    one, two = build("llama"), build("llama")
    for model, names in ((one, ("source", "ner")), (two, ("ner", "source"))):
        for name in names:
            sparse(model, name, len(name))
    torch.testing.assert_close(output(one), output(two), rtol=1e-5, atol=1e-6)
    task = {n: p.clone() for n, p in part(one, "ner").adapter.named_parameters()}
    inlay.detach(one, "source")
    sparse(one, "target", 50)
    with inlay.use(one, "target", "ner"):
        both = output(one)
    reference = build("llama")
    for name in ("target", "ner"):
        for label, change in values(one, name).items():
            reference.get_parameter(label).data += change
    torch.testing.assert_close(both, output(reference), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(task[n], p) for n, p in part(one, "ner").adapter.named_parameters())


@pytest.mark.parametrize("ended", [0, 1, 2, 3])
def test_every_stage_is_saved_merged_and_gone_on_with(ended: int, tmp_path: Path) -> None:
    model, fresh = build("llama"), build("llama")
    inlay.attach(model, LTSFT(count=40, rounds=2, targets=TARGETS))
    for _ in range(ended):
        learn(model, 2)
        inlay.advance(model, "default")
    learn(model, 2)
    acted = output(model)
    inlay.save(model, tmp_path)
    inlay.load(fresh, tmp_path)
    assert torch.equal(output(fresh), acted)
    left = [stage.name for stage in inlay.stages(model, "default")]
    assert [stage.name for stage in inlay.stages(fresh, "default")] == left
    assert len(left) == 4 - ended
    for other in (model, fresh):
        if len(left) > 1:
            inlay.advance(other, "default")
        learn(other, 2)
    assert torch.equal(output(fresh), output(model))
    inlay.merge(fresh)
    torch.testing.assert_close(output(fresh), output(model), rtol=1e-5, atol=1e-5)


def test_a_tied_table_has_one_change_for_both_uses() -> None:
    model = build("gpt2", tie_word_embeddings=True)
    inlay.attach(model, LTSFT(count=40, targets=("embedding", "head")))
    learn(model, 2)
    inlay.advance(model, "default")
    learn(model, 2)
    reference = build("gpt2", tie_word_embeddings=True)
    for label, change in values(model).items():
        reference.get_parameter(label).data += change
    assert len(values(model)) == 1
    torch.testing.assert_close(output(model), output(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"count": 3000}, "3,000 of 2,048, in 1 rounds"), ({"count": 2, "rounds": 3}, "2 of 2,048, in 3 rounds"),
     ({"density": 1e-5}, "0 of 2,048")],
)  # fmt: skip
def test_a_count_that_cannot_be_kept_is_refused(settings: dict[str, Any], text: str) -> None:
    model = build("llama")
    with refused(ConfigError, f"so many entries cannot be kept\n  saw: {text}", model=model):
        inlay.attach(model, LTSFT(targets=("query",), **settings))


def test_places_that_are_none_are_refused_when_loading(tmp_path: Path) -> None:
    model, fresh = build("llama"), build("llama")
    inlay.attach(model, LTSFT(count=40, targets=("query",)))
    learn(model, 1)
    inlay.advance(model, "default")
    next(iter(part(model).adapter.calibration.values()))[-1] = 32 * 32
    inlay.save(model, tmp_path)
    with refused(ConfigError, "the chosen entries are no places of the tensor", model=fresh, folder=tmp_path):
        inlay.load(fresh, tmp_path)
    edit(tmp_path, lambda m: m["parts"][0].update(data={"ended": "x"}))
    with pytest.raises(inlay.InlayError):
        inlay.load(fresh, tmp_path)


def test_it_learns_in_both_stages() -> None:
    model = settled("bert")
    inlay.attach(model, LTSFT(density=0.05), train=("head",))
    batch = batch_for(model, rows=6, labels=True)
    before, full = fit(model, batch, steps=40)
    inlay.advance(model, "default/lt_sft")
    _, sparse = fit(model, batch, steps=40)
    assert full < 0.5 * before
    assert sparse < 0.5 * before
