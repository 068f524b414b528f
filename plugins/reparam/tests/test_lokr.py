"""LoKr: equations, factor sizes, starts, counts, dropouts, convolutions, and that it learns."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from dense_checks import adapted, agrees, learns, starts_at_the_base, values
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.errors import ConfigError, TargetError
from inlay.testing.layers import deltas_of, settled, watch
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake
from inlay_reparam import LoKr
from inlay_reparam.kron import factorization, kron_linear

LINEAR = ("linear",)


def change_of(method: LoKr) -> object:
    s = method.alpha / method.rank

    def change(t: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        w1 = t["w1"] if "w1" in t else t["w1_up"] @ t["w1_down"]
        w2 = t["w2"] if "w2" in t else t["w2_up"] @ t["w2_down"]
        blocks = s * w1[:, None, :, None] * w2[None, :, None, :]
        assert blocks.shape[0] * blocks.shape[1] == rows
        return blocks.reshape(rows, columns)

    return change


@pytest.mark.parametrize(
    "method",
    [
        LoKr(rank=2, alpha=5, targets=LINEAR),
        LoKr(rank=1, decompose_both=True, targets=LINEAR),
        LoKr(rank=8, alpha=6, targets=LINEAR, zero="w2"),  # w2 whole
        LoKr(rank=3, decompose_factor=2, targets=LINEAR),
    ],
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_output_merge_and_gradients_are_the_formulas(family: str, method: LoKr) -> None:
    agrees(family, method, change_of(method))  # type: ignore[arg-type]


def test_stored_the_other_way_round() -> None:
    method = LoKr(rank=2, targets=["c_attn", "c_fc"])
    agrees("gpt2", method, change_of(method))  # type: ignore[arg-type]


def test_factorization() -> None:
    assert factorization(128) == (8, 16)
    assert factorization(127) == (1, 127)
    assert factorization(128, 4) == (4, 32)
    assert factorization(128, 5) == (4, 32)
    assert factorization(128, 64) == (64, 2)  # where the factor divides, it is taken: not sorted
    assert factorization(36) == (6, 6)
    assert factorization(1) == (1, 1)
    assert all(m * n == size and m <= n for size in range(1, 300) for m, n in [factorization(size)])


def test_a_kronecker_product_is_never_formed_and_the_same() -> None:
    g = torch.Generator().manual_seed(0)
    x, left, right = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((2, 7, 15), (4, 3), (6, 5)))
    up = torch.randn(8, 6, dtype=torch.float64, generator=g)
    assert distance(kron_linear(x, left, right), x @ torch.kron(left, right).T) < 1e-12
    assert distance(kron_linear(x, left, right, up), x @ torch.kron(left, up @ right).T) < 1e-12
    assert kron_linear(x[0, 0], left, right).shape == (24,)


@pytest.mark.parametrize("zero", ["w1", "w2"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_starts_exactly_at_the_base(family: str, zero: str) -> None:
    starts_at_the_base(family, LoKr(rank=2, zero=zero, decompose_both=True, targets=LINEAR))


def test_which_factors_start_at_zero() -> None:
    model = settled("bert", hidden_size=768, num_hidden_layers=1, intermediate_size=768)
    inlay.attach(model, LoKr(targets=["up"]), seed=0)
    (delta,) = deltas_of(model).values()
    assert delta.w1.shape == (24, 24)
    assert not delta.w1.any()
    assert 0.9 * 8**-0.5 < float(delta.w2_up.detach().abs().max()) <= 8**-0.5
    assert 0.9 * 32**-0.5 < float(delta.w2_down.detach().abs().max()) <= 32**-0.5
    inlay.detach(model)
    inlay.attach(model, LoKr(targets=["up"], zero="w2"), seed=0)
    (delta,) = deltas_of(model).values()
    assert not delta.w2_down.any()
    assert delta.w2_up.any()
    assert 0.9 * 24**-0.5 < float(delta.w1.detach().abs().max()) <= 24**-0.5


def test_counts() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096))
    assert inlay.plan(model, LoKr(targets=["0"])).parameters == 64 * 64 + 8 * (64 + 64) == 5_120
    both = LoKr(targets=["0"], decompose_both=True)
    assert inlay.plan(model, both).parameters == 8 * (64 + 64) + 8 * (64 + 64)
    assert inlay.plan(model, LoKr(targets=["0"], rank=32)).parameters == 2 * 64 * 64  # w2 is a matrix


def test_the_rank_is_the_product_of_the_factors_ranks() -> None:
    model = adapted("bert", LoKr(rank=2, targets=["query"], layers=[0]))
    (delta,) = deltas_of(model).values()
    t = values(delta)
    ranks = int(torch.linalg.matrix_rank(t["w1"])), int(torch.linalg.matrix_rank(t["w2_up"] @ t["w2_down"]))
    dense = delta.product(torch.zeros((), dtype=torch.float64)).detach()
    assert int(torch.linalg.matrix_rank(dense)) == ranks[0] * ranks[1] == 8


class Convolutions(nn.Module):
    """Layers of one and two dimensions, in groups, strided, dilated and padded in circles."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.groups = nn.Conv2d(8, 12, (1, 2), groups=2, dilation=2, padding="same", padding_mode="circular")
        self.point = nn.Conv2d(12, 4, 1)
        self.line = nn.Conv1d(4, 10, 5, padding=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 10, *) of x (B, 6, h, w)."""
        return self.line(self.point(self.groups(self.plain(x)).relu()).relu().flatten(2))


def convolutions(method: LoKr) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Convolutions().double().eval()
    inlay.attach(model, method, seed=0)
    shake(model)
    return model


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("rank", [1, 8])
def test_convolutions_are_the_formula(rank: int, effective: bool) -> None:
    method = LoKr(rank=rank, alpha=3, effective_conv=effective, targets=["plain", "groups", "point", "line"])
    model = convolutions(method)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted: dict[str, Tensor] = {}
    for site, delta in deltas_of(model).items():
        layer = model.get_submodule(site)
        t, kernel = values(delta), layer.weight.shape[2:]
        k, n = layer.weight.shape[0] // len(t["w1"]), layer.weight.shape[1] // t["w1"].shape[1]
        if "w2" in t:
            w2 = t["w2"]
        elif "w2_core" in t:
            w2 = torch.einsum("ij...,jn,ik->kn...", t["w2_core"], t["w2_down"], t["w2_up"])
        else:
            w2 = (t["w2_up"] @ t["w2_down"]).view(k, n, *kernel)
        blocks = torch.einsum("lm,kn...->lkmn...", t["w1"], w2)
        wanted[site] = layer.weight.detach() + method.alpha / rank * blocks.reshape(layer.weight.shape)
        inner, y = watch(model, site, {"x": x})
        assert distance(y, layer._conv_forward(inner, wanted[site], layer.bias)) < 1e-9
    before = model(x)
    inlay.merge(model, undo=False)
    assert all(distance(model.get_submodule(s).weight, w) < 1e-9 for s, w in wanted.items())
    assert distance(model(x), before) < 1e-9


def test_which_form_a_convolution_takes() -> None:
    model = convolutions(LoKr(rank=1, effective_conv=True, targets=["plain", "point"]))
    names = {site: set(values(delta)) for site, delta in deltas_of(model).items()}
    assert names == {"plain": {"w1", "w2_up", "w2_down", "w2_core"}, "point": {"w1", "w2_up", "w2_down"}}


SITE = "bert.encoder.layer.0.intermediate.dense"


def effect_in_training(method: LoKr, seed: int) -> tuple[Tensor, Tensor]:
    """Return (Δy in training, Δy in evaluation) at one layer."""
    model = adapted("bert", method, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    x, y = watch(model, SITE, batch_for(model))
    layer = model.get_submodule(SITE)
    base = F.linear(x, layer.weight, layer.bias)
    model.train()
    torch.manual_seed(seed)
    return watch(model, SITE, batch_for(model))[1] - base, y - base


@pytest.mark.parametrize("scaled", [True, False])
def test_rank_dropout_drops_output_features(scaled: bool) -> None:
    method = LoKr(rank=2, rank_dropout=0.5, rank_dropout_scale=scaled, targets=["up"], layers=[0])
    dropped, whole = effect_in_training(method, seed=3)
    gone = dropped.flatten(0, 1).abs().amax(0) < 1e-12
    assert 8 < int(gone.sum()) < 40
    assert distance(dropped[..., ~gone], whole[..., ~gone] * (2 if scaled else 1)) < 1e-9


def test_module_dropout_drops_all_or_nothing() -> None:
    method = LoKr(rank=2, module_dropout=0.5, targets=["up"], layers=[0])
    seen = [effect_in_training(method, seed) for seed in range(8)]
    gone = [float(d.abs().max()) < 1e-12 for d, _ in seen]
    assert any(gone)
    assert not all(gone)
    assert all(empty or distance(d, whole) < 1e-9 for (d, whole), empty in zip(seen, gone, strict=True))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank_dropout": 1.0}, "rank_dropout=1.0"),
        ({"decompose_factor": -2}, "decompose_factor=-2"),
        ({"decompose_factor": 0}, "nothing can be decomposed by 0"),
        ({"zero": "w3"}, "zero='w3'"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LoKr(**settings)


@pytest.mark.parametrize("kind", ["embedding", "norm"])
def test_other_layers_are_refused(kind: str) -> None:
    model = settled("bert")
    with pytest.raises(TargetError, match="lokr"):
        inlay.attach(model, LoKr(targets=[kind]))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_learns(family: str) -> None:
    learns(family, LoKr(targets=LINEAR), below=0.1 if family == "bert" else 0.15)
