"""Combining adapters and writing them as LoRA: on what they do to the weights, whatever their methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import inlay
from inlay.differences import differences
from inlay.errors import ConfigError
from inlay.stack import need_state
from inlay.testing import Joined
from inlay.testing.cases import members
from inlay.testing.conformance import collect
from inlay.testing.layers import deltas_of, settled
from inlay.testing.models import batch_for
from inlay.testing.profiles import profile
from inlay.testing.refusal import refused
from inlay.testing.tools import distance, shake

ROOT = Path(__file__).parents[2]
METHODS = [j for j in collect(ROOT.glob("plugins/*/tests/test_conformance.py")) if None in j.targets]
FOLDING = [j for j in METHODS if j.merges is not False]
A, B = "lora(rank=3, alpha=5, targets=['query', 'down'])", "lora(rank=2, scaling='rsqrt')"


def logits(model: nn.Module, *names: str) -> Tensor:
    with torch.no_grad(), inlay.use(model, *names):
        found: Tensor = model(**batch_for(model)).logits
    return found


def two(family: str = "bert", first: str = A, second: str = B) -> nn.Module:
    """Return a model with two adapters, "a" and "b", away from their starts."""
    model = settled(family)
    for name, stack in (("a", first), ("b", second)):
        inlay.attach(model, stack, name, activate=False, seed=ord(name))
    shake(model)
    return model


def changes(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return ΔW of an adapter by site, written out: s B A."""
    return {
        site: delta.scale * (delta.up @ delta.down).detach().double()
        for site, delta in deltas_of(model, name).items()
    }


def made(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {site: delta.weight.detach().double() for site, delta in deltas_of(model, name).items()}


@pytest.mark.parametrize("joined", FOLDING, ids=lambda j: j.name)
def test_every_method_with_a_weight_form_is_given_back(joined: Joined) -> None:
    """Alone with weight 1: exactly by "linear"; as full-size differences and as a LoRA, up to rounding."""
    family = next(f for f in ("bert", "llama") if f in joined.families)
    model = settled(family)
    data = [batch_for(model, seed=n, labels=True) for n in range(2)]
    inlay.attach(model, drawn(joined, family), "a", data=data, activate=False, seed=3)
    shake(model)
    before, adapted = logits(model), logits(model, "a")
    inlay.combine(model, {"a": 1.0}, name="same")
    assert torch.equal(logits(model, "same"), adapted)
    inlay.combine(model, {"a": 1.0}, name="dense", how="magnitude", density=1.0)
    effect = distance(adapted, before)
    assert effect > 1e-3
    assert distance(logits(model, "dense"), adapted) < 1e-5 * max(1, effect)
    inlay.combine(model, {"a": 2.0, "same": -1.0}, name="again")
    assert distance(logits(model, "again"), adapted) < 1e-5 * max(1, effect)


def drawn(joined: Joined, family: str) -> Any:
    """Return a configuration of the method that has a weight form on the family."""
    seen: list[Any] = []

    @settings(profile(), max_examples=1)
    @given(member=members(joined, "m", family).filter(lambda m: joined.merges_as(m.method, family)))
    def draw(member: Any) -> None:
        seen.append(member.method)

    draw()
    return seen[0]


def test_linear_is_the_weighted_sum_of_what_they_do() -> None:
    model = two()
    inlay.combine(model, {"a": 0.5, "b": -2.0}, name="mix")
    a, b, mix = changes(model, "a"), changes(model, "b"), made(model, "mix")
    assert mix.keys() == a.keys() | b.keys()
    for site, change in mix.items():
        expected = 0.5 * a.get(site, torch.zeros(())) - 2.0 * b.get(site, torch.zeros(()))
        assert distance(change, expected.expand_as(change)) < 1e-6


def test_cat_is_linear_as_a_lora_of_all_their_ranks() -> None:
    model = two()
    inlay.combine(model, {"a": 0.5, "b": 1.5}, name="sum")
    inlay.combine(model, {"a": 0.5, "b": 1.5}, name="cat", how="cat")
    assert distance(logits(model, "cat"), logits(model, "sum")) < 1e-5
    placed = need_state(model).find("cat")[0]
    assert placed.method.id == "lora"
    query = "bert.encoder.layer.0.attention.self.query"
    assert torch.linalg.matrix_rank(changes(model, "cat")[query].float(), rtol=1e-5) == 5


def test_svd_is_the_best_lora_of_the_rank() -> None:
    model = two()
    inlay.combine(model, {"a": 1.0, "b": 1.0}, name="sum")
    inlay.combine(model, {"a": 1.0, "b": 1.0}, name="svd", how="svd", rank=2)
    for site, change in made(model, "sum").items():
        singular = torch.linalg.svdvals(change)
        left = (change - changes(model, "svd")[site]).norm()
        assert abs(float(left - singular[2:].norm())) < 1e-5 * float(singular.norm())


def test_magnitude_keeps_the_largest_share_of_each() -> None:
    model = two()
    inlay.combine(model, {"a": 1.0}, name="pruned", how="magnitude", density=0.1)
    for site, change in changes(model, "a").items():
        keep = round(0.1 * change.numel())
        floor = change.abs().flatten().sort(descending=True).values[keep - 1]
        expected = torch.where(change.abs() >= floor, change, torch.zeros_like(change))
        assert distance(made(model, "pruned")[site], expected) < 1e-6


def test_ties_is_what_the_paper_writes() -> None:
    """Trim each, elect the sign of the weighted sum, mean of what agrees: written out entry by entry."""
    model = two(second="lora(rank=2, targets=['query', 'down'])")
    inlay.combine(model, {"a": 1.0, "b": 3.0}, name="ties", how="ties", density=0.3)
    a, b, mix = changes(model, "a"), changes(model, "b"), made(model, "ties")
    for site in a:
        trimmed = []
        for change in (a[site], b[site]):
            order = change.abs().flatten().argsort(descending=True)[: round(0.3 * change.numel())]
            kept = torch.zeros(change.numel(), dtype=torch.float64)
            kept[order] = change.flatten()[order]
            trimmed.append(kept)
        for entry in range(0, a[site].numel(), 37):
            values = [(1.0, trimmed[0][entry].item()), (3.0, trimmed[1][entry].item())]
            sign = sum(w * v for w, v in values)
            agreeing = [(w, v) for w, v in values if w * v * sign > 0]
            expected = sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
            assert abs(mix[site].flatten()[entry].item() - expected) < 1e-6


@pytest.mark.parametrize("how", ["dare", "dare_ties"])
def test_dare_drops_at_random_and_rescales(how: str) -> None:
    model = two()
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        inlay.combine(model, {"a": 1.0}, name=name, how=how, density=0.25, seed=seed)
    shares = []
    for site, change in changes(model, "a").items():
        found = made(model, "one")[site]
        kept = found != 0
        assert distance(found[kept], change[kept] / 0.25) < 1e-5
        shares.append(kept.double().mean())
        assert torch.equal(found, made(model, "again")[site])
        assert not torch.equal(found, made(model, "other")[site])
    assert 0.22 < float(torch.stack(shares).mean()) < 0.28


@pytest.mark.parametrize("scaling", ["standard", "rsqrt"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_scaling_and_magnitudes_are_in_it(kind: str, scaling: str) -> None:
    """What peft gets wrong for rsLoRA and DoRA: the sum is of what the adapters do, not of their tensors."""
    model = two("llama", f"{kind}(rank=4, alpha=7, scaling='{scaling}')", "ia3")
    inlay.combine(model, {"a": 1.0, "b": 0.0}, name="mix")
    assert distance(logits(model, "mix"), logits(model, "a")) < 1e-6


def test_fused_layers_and_whole_stacks() -> None:
    model = two("gpt2", "lora(rank=2, targets=['query', 'value']) + ia3", "lora(rank=1, targets=['linear'])")
    inlay.combine(model, {"a": 1.0, "b": 0.0}, name="mix")
    assert distance(logits(model, "mix"), logits(model, "a")) < 1e-6
    assert {p.method.id for p in need_state(model).find("mix")} == {"dense"}


def test_the_combination_is_saved_and_loaded(tmp_path: Path) -> None:
    model = two()
    inlay.combine(model, {"a": 1.0, "b": 1.0}, name="mix")
    inlay.save(model, tmp_path / "mix", "mix")
    other = settled("bert")
    inlay.load(other, tmp_path / "mix", "mix")
    assert torch.equal(logits(other, "mix"), logits(model, "mix"))


def test_tensors_is_the_sum_of_the_tensors() -> None:
    model = two(second=A)
    inlay.combine(model, {"a": 0.25, "b": 0.5}, name="mix", how="tensors")
    for site, mixed in deltas_of(model, "mix").items():
        one, other = (deltas_of(model, n)[site] for n in ("a", "b"))
        torch.testing.assert_close(mixed.down, 0.25 * one.down + 0.5 * other.down)


# -- to LoRA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_low_rank_change_becomes_a_lora_exactly(family: str) -> None:
    model = two(family, "lora(rank=3, alpha=20, scaling='rsqrt', targets=['linear'])")
    report = inlay.to_lora(model, "a", name="plain")
    assert report.rank == 3
    assert report.worst < 1e-6
    assert {site.rank for site in report.sites} == {3}
    assert distance(logits(model, "plain"), logits(model, "a")) < 1e-5


def test_the_error_of_a_lower_rank_is_stated_and_right() -> None:
    model = two(first="dora(rank=4)")
    report = inlay.to_lora(model, "a", name="less", rank=4)
    exact = differences(need_state(model).find("a"))
    for site in report.sites:
        singular = torch.linalg.svdvals(exact[site.site].weight)
        assert abs(site.error - float(singular[4:].norm() / singular.norm())) < 1e-6
        left = (exact[site.site].weight - changes(model, "less")[site.site]).norm() / singular.norm()
        assert abs(site.error - float(left)) < 1e-5
    assert 0 < report.worst < 1
    assert str(report).startswith("rank 4 at 10 sites; ranks of the changes up to 32; largest error")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_ranks_are_each_sites_own_and_biases_go_along(family: str) -> None:
    model = two(family, "lora(rank={'query': 3, 'down': 1}, targets=['query', 'down']) + ia3")
    report = inlay.to_lora(model, "a", name="plain")
    assert distance(logits(model, "plain"), logits(model, "a")) < 1e-5
    assert {s.rank for s in report.sites if s.site.endswith(("query", "q_proj", "[query]"))} == {3}


def test_embeddings_and_convolutions_become_loras() -> None:
    for family, target in (("bert", "embedding"), ("vit", "*.projection")):
        model = settled(family)
        inlay.attach(model, f"lora(rank=2, targets=['{target}'])", "a", activate=False)
        shake(model)
        report = inlay.to_lora(model, "a", name="plain")
        assert report.rank == 2
        assert distance(logits(model, "plain"), logits(model, "a")) < 1e-5


# -- refusals --------------------------------------------------------------------------------------------


def test_what_has_no_weight_form_is_refused() -> None:
    model = two(first="serial_adapter")
    match = r"'a/serial_adapter' is no change of weights that could be computed with[\s\S]*how=\"tensors\""
    with refused(ConfigError, match, model=model):
        inlay.combine(model, {"a": 1.0, "b": 1.0}, name="mix")
    with refused(ConfigError, match, model=model):
        inlay.to_lora(model, "a", name="plain")


def test_changes_that_overlap_and_do_not_commute_are_refused() -> None:
    whole = "lora(rank=2, targets=['*.c_attn'])"
    model = two("gpt2", f"{whole} + dora(rank=2, targets=['query'])", whole)
    match = (
        r"two changes of one layer overlap and do not commute\n  saw: 'a/lora' at .*c_attn and 'a/dora' at"
    )
    with refused(ConfigError, match, model=model):
        inlay.combine(model, {"a": 1.0, "b": 1.0}, name="mix")


def test_a_lora_that_cannot_hold_the_change_is_refused() -> None:
    model = two(first="ssf")
    match = r"low rank cannot hold every change of this adapter\n  saw: \S+ is a norm \(\d+ of \d+ sites\)"
    with refused(ConfigError, match, model=model):
        inlay.to_lora(model, "a", name="plain")
    bare = settled("bert")
    inlay.attach(bare, "lora", "a")
    with refused(
        ConfigError, r"there is no change to write in low rank\n  saw: 4 sites, every ΔW 0", model=bare
    ):
        inlay.to_lora(bare, "a", name="plain")


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4"])
def test_what_is_no_rank_is_refused(rank: Any) -> None:
    model = two()
    with refused(ConfigError, r"this cannot be a rank\n  saw: rank=", model=model):
        inlay.to_lora(model, "a", name="plain", rank=rank)
    with refused(ConfigError, r"'cat' cannot have this rank\n  saw: rank=", model=model):
        inlay.combine(model, {"a": 1.0}, name="mix", how="cat", rank=rank)


def test_ways_that_need_a_rank_or_have_none() -> None:
    model = two()
    with refused(ConfigError, r"'svd' cannot have this rank\n  saw: rank=None", model=model):
        inlay.combine(model, {"a": 1.0}, name="mix", how="svd")
    with refused(ConfigError, r"'tensors' cannot have this rank\n  saw: rank=2", model=model):
        inlay.combine(model, {"a": 1.0}, name="mix", how="tensors", rank=2)


@pytest.mark.parametrize("density", [0, 1.5, -0.1, "half", float("nan")])
def test_what_is_no_density_is_refused(density: Any) -> None:
    model = two()
    with refused(ConfigError, r"this is no share of the entries\n  saw: density=", model=model):
        inlay.combine(model, {"a": 1.0}, name="mix", how="ties", density=density)
