"""Intrinsic SAID: the Fastfood transform, its gradient, tied tensors, counts, and that it learns."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from dense_checks import learns, starts_at_the_base
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.authoring.projections import Fastfood, hadamard_matrix, transform
from inlay.authoring.sparse import distinct, places
from inlay.errors import ConfigError
from inlay.stack import need_state
from inlay.testing.layers import deltas_of, gradients, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance
from inlay_reparam import IntrinsicSAID

LINEAR = ("linear",)


def sylvester(size: int) -> Tensor:
    """Return H by its definition: (−1) to the number of ones that row and column have in common."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128, 512])
def test_the_transform_is_h(size: int) -> None:
    v = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    h, matrix = sylvester(size), hadamard_matrix()
    assert distance(transform(v, matrix), h @ v) < 1e-12
    assert distance(transform(transform(v, matrix), matrix), size * v) < 1e-12
    g = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((transform(v, matrix) * g).sum(), v)
    assert distance(found, h @ g) < 1e-12


def published(z: Tensor, part: Fastfood) -> Tensor:
    """Return F(z) of the paper at full length, Π given by where it leads among the padded numbers."""
    length = 2 ** math.ceil(math.log2(part.size)) if part.size > 1 else 1
    b = torch.ones(length, dtype=z.dtype)
    b[: len(part.signs)] = part.signs.to(z.dtype)
    padded = F.pad(z[:length], (0, max(0, length - len(z))))
    h, g = sylvester(length), part.gains.to(z.dtype)
    mixed = (h @ (b * padded))[part.order.long()]
    scale = math.sqrt(length * float(g.square().sum())) * math.sqrt(part.size / length)
    return ((h @ (g * mixed))[: part.size] / scale).view(part.shape)


def said(model: nn.Module) -> nn.Module:
    (placed,) = need_state(model).find("default")
    return placed.adapter.shared["said"]


@pytest.mark.parametrize(
    ("family", "d", "scaled"),
    [("llama", 60, True), ("bert", 300, False)]
    + [
        pytest.param(family, d, scaled, marks=pytest.mark.slow)
        for family, d, scaled in product(["llama", "bert"], [60, 300], [True, False])
        if (family, d, scaled) not in (("llama", 60, True), ("bert", 300, False))
    ],
)
def test_every_tensor_is_moved_by_the_formula(family: str, d: int, scaled: bool) -> None:
    model = settled(family).double()
    inlay.attach(model, IntrinsicSAID(d=d, said=scaled), seed=0)
    space, g = said(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        space.z.copy_(torch.randn(space.z.shape, generator=g, dtype=torch.float64))
        if scaled:
            space.scales.add_(torch.randn(space.scales.shape, generator=g, dtype=torch.float64))
    wanted: dict[str, Tensor] = {}
    plain = {name: p.detach().clone() for name, p in model.named_parameters() if ".inlay" not in name}
    for site, delta in deltas_of(model).items():
        for name, number in delta.numbers.items():
            moved = published(space.z.detach(), getattr(delta, name))
            factor = space.scales[number].detach() if scaled else 1.0
            wanted[f"{site}.{name}"] = plain[f"{site}.{name}"] + factor * moved
    assert len(wanted) > 15
    batch = batch_for(model)
    before = model(**batch).logits
    inlay.merge(model, undo=False)
    merged = dict(model.named_parameters())
    assert all(distance(merged[name], tensor) < 1e-9 for name, tensor in wanted.items())
    assert distance(model(**batch).logits, before) < 1e-9


def test_the_short_first_transform_is_the_long_one() -> None:
    """A permutation of a vector that repeats itself points into one period of it."""
    init = inlay.authoring.Init("seed", torch.zeros(0))
    part = Fastfood(init, (40, 25), 20)
    assert part.order.shape == part.gains.shape == (1024,)
    assert part.repeats == 32
    assert torch.bincount(part.order, minlength=32).tolist() == [32] * 32
    assert set(part.signs.tolist()) == {1.0, -1.0}
    padded = F.pad(torch.randn(20, dtype=torch.float64), (0, 1004))
    h = sylvester(1024) @ padded
    assert torch.equal(h.view(32, 32), h[:32].expand(32, 32))


def test_it_is_linear_and_keeps_length() -> None:
    matrix, g = hadamard_matrix(), torch.Generator().manual_seed(0)
    for shape, space, expected in (((768, 16), 200, 1.0), ((300,), 256, 1.0), ((20,), 64, 32 / 64)):
        ratios = []
        for seed in range(20):
            part = Fastfood(inlay.authoring.Init(f"{seed}", torch.zeros(0)), shape, space)
            one, two = (torch.randn(space, generator=g, dtype=torch.float64) for _ in range(2))
            both = part(3 * one + two, matrix)
            assert distance(both, 3 * part(one, matrix) + part(two, matrix)) < 1e-12
            ratios.append(float(part(one, matrix).square().sum() / one.square().sum()))
        assert sum(ratios) / len(ratios) == pytest.approx(expected, rel=0.2)


def test_the_gradient_is_the_transforms_own() -> None:
    """The authors' backward divides by L here."""
    part, matrix = Fastfood(inlay.authoring.Init("a", torch.zeros(0)), (6, 5), 12), hadamard_matrix()
    z = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: part(z, matrix), (z,))


@pytest.mark.parametrize("projection", ["fastfood", "dense"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_starts_exactly_at_the_base(family: str, projection: str) -> None:
    starts_at_the_base(family, IntrinsicSAID(d=100, projection=projection))


def test_scales_learn_once_z_moved() -> None:
    model = settled("bert")
    inlay.attach(model, IntrinsicSAID(d=200), seed=0)
    batch = batch_for(model, labels=True)
    first = gradients(model, batch)
    assert {name.rpartition(".")[2]: bool(g.any()) for name, g in first.items()} == {
        "z": True,
        "scales": False,
    }
    torch.optim.AdamW(inlay.parameter_groups(model)).step()
    assert all(g.any() for g in gradients(model, batch).values())


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_there_are_exactly_d_parameters(family: str, scaled: bool) -> None:
    model = settled(family)
    method = IntrinsicSAID(d=321, said=scaled)
    assert inlay.plan(model, method).parameters == 321
    plan = inlay.attach(model, method, seed=0)
    count = len(distinct(places(plan.parts[0].sites)))
    space = said(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 321
    assert len(space.z) == (321 - count if scaled else 321)


def test_what_is_drawn_is_of_the_key_and_not_saved() -> None:
    made = []
    for seed, key in ((0, 0), (1, 0), (0, 1)):
        model = settled("bert")
        inlay.attach(model, IntrinsicSAID(d=100, key=key, targets=["query"], layers=[0]), seed=seed)
        (delta,) = deltas_of(model).values()
        made.append(delta.weight.gains.clone())
        assert not delta.state_dict()
        assert set(said(model).state_dict()) == {"z", "scales"}
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_tied_tensor_is_moved_once() -> None:
    model = settled("gpt2").double()
    inlay.attach(model, IntrinsicSAID(d=100, targets=["embedding", "head"]), seed=0)
    deltas = deltas_of(model)
    table, head = deltas["transformer.wte"], deltas["lm_head"]
    assert head.weight.module is table.weight
    assert head.numbers["weight"] == table.numbers["weight"]
    assert len(said(model).scales) == 1
    with torch.no_grad():
        said(model).z.normal_(generator=torch.Generator().manual_seed(0))
    batch = batch_for(model)
    y = model(**batch).logits.detach()
    moves = {
        n: d.weight(said(model).z, said(model).hadamard).detach() for n, d in deltas.items() if n != "lm_head"
    }
    other = settled("gpt2").double()
    with torch.no_grad():
        for name, move in moves.items():
            other.get_submodule(name).weight.add_(move)
    assert distance(y, other(**batch).logits) < 1e-9


def test_half_precision_models_are_moved_in_single_precision() -> None:
    model = settled("bert").to(torch.float16)
    inlay.attach(model, IntrinsicSAID(d=500), seed=0)
    with torch.no_grad():
        said(model).z.normal_(generator=torch.Generator().manual_seed(0))
    delta = deltas_of(model)["bert.embeddings.word_embeddings"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        moved = delta(None).weight
    assert moved.dtype == torch.float32
    assert bool(moved.isfinite().all())
    assert distance(moved, published(said(model).z.detach().double(), delta.weight)) < 1e-6


def test_relative_positions_are_left_out() -> None:
    model = settled("t5")
    plan = inlay.plan(model, IntrinsicSAID(d=100))
    assert not any("relative" in site.name for site in plan.parts[0].sites)
    with pytest.raises(inlay.errors.TargetError, match="relative positions has no rows to route"):
        inlay.plan(model, IntrinsicSAID(d=100, targets=["*relative_attention_bias"]))


@pytest.mark.parametrize(("setting", "value"), [("d", 0), ("projection", "sparse"), ("key", -1)])
def test_settings_are_checked(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{setting}={value!r}"):
        IntrinsicSAID(**{setting: value})


def test_a_d_that_the_scales_use_up_is_refused() -> None:
    model = settled("bert")
    with pytest.raises(ConfigError, match=r"d leaves no dimension beside[\s\S]*d=8, 8 tensors[\s\S]*above 8"):
        inlay.attach(model, IntrinsicSAID(d=8, targets=["query", "value"]))
    assert "_inlay_state" not in vars(model)
    assert inlay.plan(model, IntrinsicSAID(d=8, said=False, targets=["query", "value"])).parameters == 8


@pytest.mark.parametrize(("family", "below"), [("bert", 0.1), ("llama", 0.2)])
def test_it_learns(family: str, below: float) -> None:
    learns(family, IntrinsicSAID(d=2000), below=below)
