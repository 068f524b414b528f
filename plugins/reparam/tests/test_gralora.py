"""GraLoRA: the grid of blocks, hybrid ranks, starts, counts, and that it learns."""

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
from inlay.testing.tools import distance
from inlay_reparam import GraLoRA

LINEAR = ("linear",)


def change_of(method: GraLoRA) -> object:
    s = method.alpha / (method.rank + method.hybrid_rank)

    def change(t: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        k, piece = method.k, method.rank // method.k

        def block(j: int, n: int) -> Tensor:
            a = t["down"][n][:, j * piece : (j + 1) * piece]
            b = t["up"][j][n * piece : (n + 1) * piece]
            return s * (a @ b).T

        dense = torch.cat([torch.cat([block(j, n) for n in range(k)], 1) for j in range(k)])
        assert dense.shape == (rows, columns)
        return dense + s * t["hybrid_up"] @ t["hybrid_down"] if method.hybrid_rank else dense

    return change


@pytest.mark.parametrize(
    "method",
    [
        GraLoRA(rank=4, alpha=6, targets=LINEAR),
        GraLoRA(rank=8, k=4, hybrid_rank=3, targets=LINEAR),
        GraLoRA(rank=3, k=1, targets=LINEAR),
    ],
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_output_merge_and_gradients_are_the_formulas(family: str, method: GraLoRA) -> None:
    agrees(family, method, change_of(method))  # type: ignore[arg-type]


def test_stored_the_other_way_round() -> None:
    method = GraLoRA(rank=4, targets=["c_attn", "c_fc"])
    agrees("gpt2", method, change_of(method))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_starts_exactly_at_the_base(family: str) -> None:
    starts_at_the_base(family, GraLoRA(rank=4, hybrid_rank=2, targets=LINEAR))


def test_starting_values() -> None:
    model = settled("bert", hidden_size=768, num_hidden_layers=1, intermediate_size=1024)
    inlay.attach(model, GraLoRA(k=4, hybrid_rank=8, targets=["up"]), seed=0)
    (delta,) = deltas_of(model).values()
    assert delta.down.shape == (4, 192, 32)
    assert delta.up.shape == (4, 32, 256)
    assert 0.99 * (4 / 768) ** 0.5 < float(delta.down.detach().abs().max()) <= (4 / 768) ** 0.5
    assert 0.98 * 768**-0.5 < float(delta.hybrid_down.detach().abs().max()) <= 768**-0.5
    assert not delta.up.any()
    assert not delta.hybrid_up.any()


def test_with_one_block_it_is_lora() -> None:
    model = adapted("bert", GraLoRA(rank=4, alpha=6, k=1, targets=["up"], layers=[0]))
    ((site, delta),) = deltas_of(model).items()
    layer = model.get_submodule(site)
    x, y = watch(model, site, batch_for(model))
    low_rank = 1.5 * x @ delta.down[0] @ delta.up[0]
    assert distance(y, F.linear(x, layer.weight, layer.bias) + low_rank) < 1e-9


def test_the_rank_is_k_times_r() -> None:
    for k, rank in ((2, 8), (4, 16)):
        model = adapted("bert", GraLoRA(rank=4, k=k, targets=["query"], layers=[0]))
        (delta,) = deltas_of(model).values()
        dense = delta.product(torch.zeros((), dtype=torch.float64)).detach()
        assert int(torch.linalg.matrix_rank(dense)) == rank


def test_counts() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 3072))
    assert inlay.plan(model, GraLoRA(targets=["0"])).parameters == 32 * (768 + 3072)
    assert inlay.plan(model, GraLoRA(targets=["0"], hybrid_rank=16)).parameters == 48 * (768 + 3072)


def test_dropout_acts_on_what_is_read_and_only_in_training() -> None:
    method = GraLoRA(rank=4, dropout=0.5, targets=["up"], layers=[0])
    model = adapted("bert", method, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ((site, delta),) = deltas_of(model).items()
    layer = model.get_submodule(site)
    dense = change_of(method)(values(delta), *layer.weight.shape)  # type: ignore[operator]
    model.train()
    torch.manual_seed(1)
    x, y = watch(model, site, batch_for(model))
    torch.manual_seed(1)
    expected = F.linear(x, layer.weight, layer.bias) + F.linear(F.dropout(x, 0.5), dense)
    assert distance(y, expected) < 1e-9


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rank": 0}, "rank=0"),
        ({"k": 0}, "k=0"),
        ({"rank": 6, "k": 4}, r"rank=6, k=4[\s\S]*among 1, 2, 3, 6,"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        GraLoRA(**settings)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (
            GraLoRA(rank=6, k=3, targets=["query"]),
            r"k does not divide the layer[\s\S]*one of 1, 2, 4, 8, 16, 32",
        ),
        (
            GraLoRA(rank=24, targets=["value"]),
            r"rank \+ hybrid_rank is larger than what it is taken from[\s\S]*at most 16",
        ),
    ],
)
def test_sizes_are_checked_before_the_model_is_touched(method: GraLoRA, text: str) -> None:
    model = settled("llama")
    with pytest.raises(ConfigError, match=text):
        inlay.attach(model, method)
    assert "_inlay_state" not in vars(model)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_learns(family: str) -> None:
    learns(family, GraLoRA(rank=8, targets=LINEAR))
