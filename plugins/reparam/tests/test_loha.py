"""LoHa: equations, both ways to apply it, starts, counts, convolutions, and that it learns."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from dense_checks import adapted, agrees, learns, starts_at_the_base, values
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import deltas_of, settled, watch
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake
from inlay_reparam import LoHa

LINEAR = ("linear",)


def change_of(method: LoHa) -> object:
    s = method.alpha / method.rank
    return lambda t, rows, columns: s * (t["up1"] @ t["down1"]) * (t["up2"] @ t["down2"])


@pytest.mark.parametrize(
    "method",
    [
        LoHa(rank=2, alpha=5, targets=LINEAR),  # r² products of columns and rows
        LoHa(rank=7, alpha=6, targets=LINEAR, init="normal"),  # as a matrix
    ],
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_output_merge_and_gradients_are_the_formulas(family: str, method: LoHa) -> None:
    agrees(family, method, change_of(method))  # type: ignore[arg-type]


def test_stored_the_other_way_round() -> None:
    method = LoHa(rank=2, targets=["c_attn", "c_fc"])
    agrees("gpt2", method, change_of(method))  # type: ignore[arg-type]


@pytest.mark.parametrize("init", ["kaiming", "normal"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_starts_exactly_at_the_base(family: str, init: str) -> None:
    starts_at_the_base(family, LoHa(rank=2, init=init, targets=LINEAR))


def test_starting_values() -> None:
    model = settled("bert", hidden_size=768, num_hidden_layers=1, intermediate_size=1024)
    inlay.attach(model, LoHa(targets=["up"]), seed=0)
    (delta,) = deltas_of(model).values()
    assert not delta.down2.any()
    for name, bound in (("up1", 8**-0.5), ("up2", 8**-0.5), ("down1", 768**-0.5)):
        assert 0.98 * bound < float(getattr(delta, name).detach().abs().max()) <= bound
    inlay.detach(model)
    inlay.attach(model, LoHa(targets=["up"], init="normal"), seed=0)
    (delta,) = deltas_of(model).values()
    assert not delta.up2.any()
    for name, std in (("up1", 0.1), ("down1", 1.0), ("down2", 1.0)):
        assert float(getattr(delta, name).detach().std()) == pytest.approx(std, rel=0.05)


def test_counts() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 768), nn.Conv2d(768, 64, 3, groups=4))
    assert inlay.plan(model, LoHa(targets=["0"])).parameters == 2 * 8 * (768 + 768) == 24_576
    assert inlay.plan(model, LoHa(targets=["1"])).parameters == 16 * (192 * 9 + 64)
    effective = LoHa(targets=["1"], effective_conv=True)
    assert inlay.plan(model, effective).parameters == 16 * (192 + 64 + 8 * 9)


def test_the_rank_is_the_square_of_r() -> None:
    model = adapted("bert", LoHa(rank=3, targets=["up"], layers=[0]))
    (delta,) = deltas_of(model).values()
    assert int(torch.linalg.matrix_rank(delta.product(torch.zeros((), dtype=torch.float64)).detach())) == 9


def test_with_a_second_product_of_ones_it_is_lora() -> None:
    model = adapted("bert", LoHa(rank=4, alpha=6, targets=["up"], layers=[0]))
    ((site, delta),) = deltas_of(model).items()
    with torch.no_grad():
        delta.up2.fill_(0.5)
        delta.down2.fill_(0.5)
    layer = model.get_submodule(site)
    x, y = watch(model, site, batch_for(model))
    low_rank = 6 / 4 * F.linear(F.linear(x, delta.down1), delta.up1)
    assert distance(y, F.linear(x, layer.weight, layer.bias) + low_rank) < 1e-9


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.groups = nn.Conv2d(8, 12, (1, 2), groups=2, dilation=2, padding="same", padding_mode="circular")
        self.point = nn.Conv2d(12, 4, 1)
        self.line = nn.Conv1d(4, 10, 5, padding=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 10, *) of x (B, 6, h, w)."""
        return self.line(self.point(self.groups(self.plain(x)).relu()).relu().flatten(2))


def kernel_of(t: Mapping[str, Tensor], s: float, shape: torch.Size) -> Tensor:
    """Return ΔW of a convolution, in the flattened or the effective form, from published formulas."""
    if "core1" not in t:
        return (s * (t["up1"] @ t["down1"]) * (t["up2"] @ t["down2"])).view(shape)
    one, two = (torch.einsum("ij...,jr,ip->pr...", t[f"core{j}"], t[f"down{j}"], t[f"up{j}"]) for j in (1, 2))
    return s * one * two


@pytest.mark.parametrize("effective", [False, True])
def test_convolutions_are_the_formula(effective: bool) -> None:
    method = LoHa(rank=2, alpha=3, effective_conv=effective, targets=["plain", "groups", "point", "line"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Convolutions().double().eval()
    inlay.attach(model, method, seed=0)
    shake(model)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted: dict[str, Tensor] = {}
    for site, delta in deltas_of(model).items():
        layer = model.get_submodule(site)
        own = {name: p.requires_grad_() for name, p in delta.named_parameters()}
        free = {name: value.requires_grad_() for name, value in values(delta).items()}
        inner, y = watch(model, site, {"x": x})
        kernel = kernel_of(free, 1.5, layer.weight.shape)
        wanted[site] = (layer.weight + kernel).detach()
        assert distance(y, layer._conv_forward(inner, wanted[site], layer.bias)) < 1e-9
        direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
        dense = layer._conv_forward(inner, kernel, None)
        expected = torch.autograd.grad((dense * direction).sum(), list(free.values()))
        ours = layer._conv_forward(inner, delta.product(inner), None)
        found = torch.autograd.grad((ours * direction).sum(), list(own.values()))
        assert all(distance(a, b) < 1e-9 for a, b in zip(found, expected, strict=True)), site
    before = model(x)
    inlay.merge(model, undo=False)
    assert all(distance(model.get_submodule(s).weight, w) < 1e-9 for s, w in wanted.items())
    assert distance(model(x), before) < 1e-9


def test_rank_dropout_of_every_row_is_no_division_by_zero() -> None:
    model = nn.Sequential(nn.Conv1d(4, 2, 3)).train()
    inlay.attach(model, LoHa(rank=2, rank_dropout=0.9, targets=["0"]), seed=0)
    shake(model)
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    with inlay.use(model):
        base = model(x)
    torch.manual_seed(0)
    outputs = [model(x) for _ in range(20)]
    assert all(bool(y.isfinite().all()) for y in outputs)
    assert any(torch.equal(y, base) for y in outputs)


@pytest.mark.parametrize(
    ("settings", "text"), [({"rank": 0}, "rank=0"), ({"alpha": 0}, "alpha=0"), ({"init": "x"}, "init='x'")]
)
def test_settings_are_checked(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LoHa(**settings)


def test_a_rank_above_the_layers_is_refused() -> None:
    model = settled("llama")
    with pytest.raises(
        ConfigError, match=r"rank is larger than what it is taken from[\s\S]*k_proj is \(16, 32\)"
    ):
        inlay.attach(model, LoHa(rank=20, targets=["key"]))
    assert "_inlay_state" not in vars(model)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_learns(family: str) -> None:
    learns(family, LoHa(targets=LINEAR))
