"""KronA, KronA_B and KronA_B^res: equations, starts, counts, and that they learn."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from dense_checks import adapted, agrees, learns, starts_at_the_base, values
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.errors import CannotMerge, ConfigError
from inlay.testing.layers import deltas_of, settled, watch
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake
from inlay_reparam import KronA, KronAB, KronABRes

LINEAR = ("linear",)


def kronecker(p: Tensor, q: Tensor) -> Tensor:
    """Return P ⊗ Q, block (i, j) being P_ij Q."""
    return torch.cat([torch.cat([entry * q for entry in row], dim=1) for row in p])


def change_of(method: KronA) -> object:
    def change(t: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        dense = method.scale * kronecker(t["left"], t["right"])
        assert dense.shape == (rows, columns)
        return dense

    return change


@pytest.mark.parametrize(
    "method",
    [
        KronA(scale=3.0, targets=LINEAR),
        KronA(shape=(8, 2), targets=LINEAR),
        KronA(shape=(2, 16), targets=LINEAR),
    ],
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_output_merge_and_gradients_are_the_formulas(family: str, method: KronA) -> None:
    agrees(family, method, change_of(method))  # type: ignore[arg-type]


def test_stored_the_other_way_round() -> None:
    method = KronA(targets=["c_attn", "c_fc"])
    agrees("gpt2", method, change_of(method))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [KronA(targets=LINEAR), KronAB(bias=True), KronABRes(bias=True)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_starts_exactly_at_the_base(family: str, method: KronA) -> None:
    starts_at_the_base(family, method)


def test_starting_values() -> None:
    model = settled("bert", hidden_size=768, num_hidden_layers=1, intermediate_size=768)
    inlay.attach(model, KronA(targets=["up"]), seed=0)
    (delta,) = deltas_of(model).values()
    assert delta.left.shape == (32, 24)
    assert delta.right.shape == (24, 32)
    assert not delta.right.any()
    assert 0.98 * 24**-0.5 < float(delta.left.detach().abs().max()) <= 24**-0.5


def test_counts() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 768), nn.Linear(768, 3072))
    assert inlay.plan(model, KronA(targets=["0"], shape=(32, 24))).parameters == 32 * 24 + 24 * 32 == 1_536
    assert inlay.plan(model, KronA(targets=["0"])).parameters == 1_536
    assert inlay.plan(model, KronA(targets=["1"], shape=(64, 24))).parameters == 64 * 24 + 48 * 32


def test_counts_beside_a_sublayer() -> None:
    model = settled("bert", hidden_size=48, num_hidden_layers=1)
    plain = 8 * 6 + 6 * 8
    assert inlay.plan(model, KronAB()).parameters == plain
    assert inlay.plan(model, KronAB(bias=True)).parameters == plain + 48
    assert inlay.plan(model, KronABRes()).parameters == plain + 1


def test_of_shape_out_by_one_it_is_lora_of_rank_one() -> None:
    model = adapted("bert", KronA(shape=(48, 1), scale=2.0, targets=["up"], layers=[0]))
    ((site, delta),) = deltas_of(model).items()
    t = values(delta)
    assert t["left"].shape == (48, 1)
    assert t["right"].shape == (1, 32)
    layer = model.get_submodule(site)
    x, y = watch(model, site, batch_for(model))
    low_rank = 2 * F.linear(F.linear(x, t["right"]), t["left"])
    assert distance(y, F.linear(x, layer.weight, layer.bias) + low_rank) < 1e-9


def test_the_rank_is_the_product_of_the_factors_ranks() -> None:
    model = adapted("bert", KronA(shape=(4, 8), targets=["query"], layers=[0]))
    (delta,) = deltas_of(model).values()
    with torch.no_grad():
        delta.right.copy_(delta.right[:, :1] @ delta.right[:1])  # (8, 4) of rank 1
    dense = delta.product(torch.zeros((), dtype=torch.float64)).detach()
    assert int(torch.linalg.matrix_rank(dense)) == 4


PARALLEL = (
    KronAB(scale=2.0),
    KronAB(bias=True, shape=(8, 2)),
    KronABRes(scale=2.0, residual=1.0),
    KronABRes(bias=True),
)


@pytest.mark.parametrize("method", PARALLEL)
@pytest.mark.parametrize(
    ("family", "sublayer", "reads"),
    [("llama", "model.layers.0.mlp", "up_proj"), ("gpt2", "transformer.h.0.mlp", "c_fc")],
)
def test_beside_the_feed_forward(family: str, sublayer: str, reads: str, method: KronAB) -> None:
    model = adapted(family, method)
    batch = batch_for(model)
    x, _ = watch(model, f"{sublayer}.{reads}", batch)
    _, y = watch(model, sublayer, batch)
    with inlay.use(model):
        plain = model.get_submodule(sublayer)(x)
    t = values(next(iter(deltas_of(model).values())))
    expected = plain + method.scale * F.linear(x, kronecker(t["left"], t["right"]))
    expected = expected + t.get("bias", torch.zeros(())) + t.get("skip", torch.zeros(())) * x
    assert ("skip" in t) == isinstance(method, KronABRes)
    assert distance(y, expected) < 1e-9
    assert distance(y, plain) > 0.01


def test_gradients_beside_a_sublayer() -> None:
    model = adapted("llama", KronABRes(bias=True), num_hidden_layers=1)
    (delta,) = deltas_of(model).values()
    x = torch.randn(
        3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    own = dict(delta.named_parameters())
    found = torch.autograd.grad(delta(x, x, None).square().sum(), [x, *own.values()])
    t = {name: value.requires_grad_() for name, value in values(delta).items()}
    dense = 16 * F.linear(x, kronecker(t["left"], t["right"])) + t["bias"] + t["skip"] * x
    expected = torch.autograd.grad(dense.square().sum(), [x, *(t[name] for name in own)])
    assert all(distance(a, b) < 1e-9 for a, b in zip(found, expected, strict=True))


def test_where_the_residual_starts() -> None:
    assert KronABRes().starts_as_identity
    assert not KronABRes(residual=1.0).starts_as_identity
    model = settled("bert")
    inlay.attach(model, KronABRes(residual=0.5), seed=0)
    assert all(float(d.skip.detach()) == 0.5 for d in deltas_of(model).values())


def test_what_stands_beside_a_sublayer_does_not_merge() -> None:
    model = settled("bert")
    inlay.attach(model, KronAB(), seed=0)
    shake(model)
    with pytest.raises(CannotMerge, match="a whole sublayer's input to its output"):
        inlay.merge(model)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: KronA(shape=(4, 2, 2)), "krona: the shape of P is a pair"),
        (lambda: KronAB(shape=(4,)), "krona_b: the shape of P is a pair"),
        (lambda: KronA(shape=(0, 4)), "shape is out of range"),
        (lambda: KronA(scale=0), "scale=0"),
    ],
)
def test_settings_are_checked(make: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()  # type: ignore[operator]


def test_a_shape_that_does_not_divide_is_refused_with_those_that_do() -> None:
    model = settled("llama")
    text = r"the shape of P does not divide[\s\S]*v_proj is \(16, 32\)[\s\S]*a1 among 1, 2, 4, 8, 16 and"
    with pytest.raises(ConfigError, match=text):
        inlay.attach(model, KronA(shape=(32, 8), targets=["value"]))
    assert "_inlay_state" not in vars(model)


@pytest.mark.parametrize(
    ("family", "method", "below"),
    [
        ("bert", KronA(targets=LINEAR), 0.1),
        ("llama", KronA(targets=LINEAR), 0.3),
        ("bert", KronAB(), 0.15),
        ("bert", KronABRes(), 0.15),
    ],
)
def test_they_learn(family: str, method: KronA, below: float) -> None:
    learns(family, method, below=below)
