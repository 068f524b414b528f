"""C3A: the circulant blocks, gradients of x and w, starts, counts, and that it learns."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from dense_checks import adapted, agrees, learns, starts_at_the_base
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import deltas_of, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance
from inlay_reparam import C3A

LINEAR = ("linear",)


def change(t: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    """Return ΔW entry by entry: row l, column q of block (i, j) is w_ij[(q − l) mod b] / in."""
    kernel = t["kernel"]
    b = kernel.shape[-1]
    blocks = [
        torch.cat([torch.stack([w.roll(l) for l in range(b)]) for w in row], dim=1) for row in kernel
    ]  # rolled by l, place q holds w[(q − l) mod b]
    dense = torch.cat(blocks) / columns
    assert dense.shape == (rows, columns)
    return dense


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, None])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_output_merge_and_gradients_are_the_formulas(family: str, block: int | None) -> None:
    agrees(family, C3A(block_size=block, init="gaussian", targets=LINEAR), change)


def test_stored_the_other_way_round_and_odd_blocks() -> None:
    agrees("gpt2", C3A(block_size=8, init="gaussian", targets=["c_attn", "c_fc"]), change)
    agrees("bert", C3A(block_size=16, init="gaussian", targets=["down"]), change)


@pytest.mark.parametrize("block", [3, 5, 15])
def test_blocks_of_odd_size_through_two_layers(block: int) -> None:
    """An input gradient that is wrong shows in the layer below; each is checked against differences."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 45), nn.Tanh(), nn.Linear(45, 15)).double()
    inlay.attach(model, C3A(block_size=block, init="gaussian", targets=["0", "2"]), seed=0)
    x = torch.randn(
        2, 30, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1)
    )
    kernels = [p for d in deltas_of(model).values() for p in d.parameters()]

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return model(x)

    assert torch.autograd.gradcheck(run, (x, *kernels))


def test_a_block_of_one_is_a_dense_matrix_over_in() -> None:
    model = adapted("bert", C3A(block_size=1, targets=["up"], layers=[0]))
    (delta,) = deltas_of(model).values()
    assert distance(delta.product(torch.zeros((), dtype=torch.float64)), delta.kernel[..., 0] / 32) < 1e-12


def test_full_rank_from_one_kernel() -> None:
    model = adapted("bert", C3A(block_size=32, init="gaussian", targets=["query"], layers=[0]))
    (delta,) = deltas_of(model).values()
    assert delta.kernel.shape == (1, 1, 32)
    assert int(torch.linalg.matrix_rank(delta.product(torch.zeros((), dtype=torch.float64)).detach())) == 32


def test_starts_at_the_base_with_zeros_alone() -> None:
    starts_at_the_base("bert", C3A(init="zeros", targets=LINEAR))
    assert C3A(init="zeros").starts_as_identity
    assert not C3A().starts_as_identity


@pytest.mark.parametrize(
    ("init", "bound"), [("xavier", (6 / 1792) ** 0.5), ("kaiming", 768**-0.5), ("gaussian", None)]
)
def test_starting_values(init: str, bound: float | None) -> None:
    model = settled("bert", hidden_size=768, num_hidden_layers=1, intermediate_size=1024)
    inlay.attach(model, C3A(block_size=64, init=init, targets=["up"]), seed=0)
    (delta,) = deltas_of(model).values()
    if bound is None:
        assert float(delta.kernel.detach().std()) == pytest.approx(1, rel=0.05)
    else:
        assert 0.99 * bound < float(delta.kernel.detach().abs().max()) <= bound


def test_counts() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 768), nn.Linear(4096, 1024), nn.Linear(384, 1536))
    assert inlay.plan(model, C3A(block_size=768, targets=["0"])).parameters == 768
    assert inlay.plan(model, C3A(block_size=128, targets=["0"])).parameters == 4_608
    found = {name: inlay.plan(model, C3A(targets=[name])).parameters for name in "012"}  # 256, 256, 192
    assert found == {"0": 768 * 3, "1": 4096 * 4, "2": 384 * 8}


def test_half_precision_models() -> None:
    model = settled("bert").to(torch.bfloat16)
    inlay.attach(model, C3A(init="gaussian", targets=LINEAR), seed=0)
    output = model(**batch_for(model, labels=True))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(d.kernel.dtype == d.kernel.grad.dtype == torch.bfloat16 for d in deltas_of(model).values())


def test_a_block_that_does_not_divide_is_refused_with_those_that_do() -> None:
    model = settled("llama")
    with pytest.raises(
        ConfigError, match=r"block_size does not divide the layer[\s\S]*one of 1, 2, 4, 8, 16\n"
    ):
        inlay.attach(model, C3A(block_size=32, targets=["value"]))
    assert "_inlay_state" not in vars(model)


@pytest.mark.parametrize(("setting", "value"), [("block_size", 0), ("init", "ones")])
def test_settings_are_checked(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{setting}={value!r}"):
        C3A(**{setting: value})


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_learns(family: str) -> None:
    learns(family, C3A(targets=LINEAR), below=0.1 if family == "bert" else 0.15)
