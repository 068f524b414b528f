"""WaveFT: PyWavelets' own inverse as reference, both ways to apply it, patches, odd shapes, shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pywt
import torch
from dense_models import agrees
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import deltas_of, fit, settled
from inlay.testing.models import batch_for, build
from inlay.testing.tools import distance
from inlay_reparam import WaveFT

QUERY = "bert.encoder.layer.0.attention.self.query"
FAMILIES_OF_FILTERS = ["db1", "db2", "db3", "db6", "sym4", "sym5", "coif1", "coif2", "bior2.2"]


def inverse(full: np.ndarray[Any, Any], wavelet: str) -> np.ndarray[Any, Any]:
    """One level of PyWavelets' inverse, the quadrants read as (cA, cH; cV, cD)."""
    h, w = full.shape[0] // 2, full.shape[1] // 2
    quadrants = (full[:h, :w], (full[:h, w:], full[h:, :w], full[h:, w:]))
    return np.asarray(pywt.waverec2(quadrants, wavelet, mode="zero"))


def change(values: Any, shape: tuple[int, int], wavelet: str, seed: int = 777) -> np.ndarray[Any, Any]:
    """ΔW / scaling: pad to n + L − 2, made even, place in the middle, invert, crop in the middle."""
    length = pywt.Wavelet(wavelet).dec_len
    padded = [n + length - 2 + (n + length - 2) % 2 for n in shape]
    order = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[: len(values)]
    full = np.zeros(padded)
    offsets = [(p - n) // 2 for p, n in zip(padded, shape, strict=True)]
    full[order // shape[1] + offsets[0], order % shape[1] + offsets[1]] = values
    found = inverse(full, wavelet)
    rows, columns = ((size - n) // 2 for size, n in zip(found.shape, shape, strict=True))
    return found[rows : rows + shape[0], columns : columns + shape[1]]


def written(scaling: float, wavelet: str | None, seed: int = 777) -> Any:
    """W' with ΔW as a sum of what each coefficient gives by itself, so that autograd sees them."""

    def changed(delta: Any, weight: Tensor) -> Tensor:
        count, shape = len(delta.spectrum), tuple(weight.shape)
        total = weight
        for k, c in enumerate(delta.spectrum):
            if wavelet is None:
                order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
                one = torch.zeros(weight.numel(), dtype=weight.dtype)
                one[order[k]] = 1
                one = one.view(shape)
            else:
                one = torch.from_numpy(change(np.eye(count)[k], shape, wavelet, seed).copy())
            total = total + scaling * c * one
        return total

    return changed


@pytest.mark.parametrize("wavelet", ["db1", "db3", None])
@pytest.mark.parametrize("count", [3, 12], ids=["sparse", "dense"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_layer_is_its_dense_form(family: str, count: int, wavelet: str | None) -> None:
    settings = {"use_idwt": False} if wavelet is None else {"wavelet": wavelet}
    method = WaveFT(n_frequency=count, seed=5, targets=("query", "value", "down"), **settings)
    agrees(settled(family), method, written(25.0, wavelet, seed=5))


def grid_of(shape: tuple[int, int], count: int, **settings: Any) -> Any:
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).double()
    inlay.attach(model, WaveFT(n_frequency=count, scaling=1.0, targets=("0",), **settings))
    return deltas_of(model)["0"].grid.module  # type: ignore[union-attr]


@pytest.mark.parametrize("wavelet", FAMILIES_OF_FILTERS)
@pytest.mark.parametrize("shape", [(16, 12), (7, 9), (13, 8), (8, 13), (1, 5)], ids=str)
def test_it_is_pywavelets_inverse_for_every_filter_and_odd_sizes(
    shape: tuple[int, int], wavelet: str
) -> None:
    """Every place of the grid taken, both ways to apply it."""
    count = shape[0] * shape[1]
    values = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.from_numpy(change(values.numpy(), shape, wavelet).copy())
    grid = grid_of(shape, count, wavelet=wavelet)
    assert torch.allclose(grid.dense(values), expected, atol=1e-12)
    x = torch.eye(shape[1], dtype=torch.float64)
    assert torch.allclose(grid.sparse(x, values), expected.T, atol=1e-12)


@pytest.mark.parametrize(
    ("quadrant", "patch"),
    [((0, 0), [[1, 1], [1, 1]]), ((0, 1), [[1, 1], [-1, -1]]),
     ((1, 0), [[1, -1], [1, -1]]), ((1, 1), [[1, -1], [-1, 1]])],
    ids=["cA", "cH", "cV", "cD"],
)  # fmt: skip
def test_with_db1_a_coefficient_writes_a_patch_of_halves(
    quadrant: tuple[int, int], patch: list[list[int]]
) -> None:
    grid, p, q = grid_of((12, 8), 96), 4, 1
    order = torch.randperm(96, generator=torch.Generator().manual_seed(777))
    place = (quadrant[0] * 6 + p) * 8 + quadrant[1] * 4 + q
    found = grid.dense((order == place).double())
    expected = torch.zeros(12, 8, dtype=torch.float64)
    expected[2 * p : 2 * p + 2, 2 * q : 2 * q + 2] = torch.tensor(patch) / 2
    assert torch.allclose(found, expected, atol=1e-15)


def test_without_the_transform_n_entries_are_not_zero() -> None:
    grid = grid_of((12, 9), 17, use_idwt=False)
    assert int(grid.dense(torch.rand(17) + 1).count_nonzero()) == 17


def test_a_cast_of_the_model_does_not_round_the_filters() -> None:
    model = settled("bert")
    inlay.attach(model, WaveFT(n_frequency=3, wavelet="db2", targets=("query",)))
    delta: Any = deltas_of(model)[QUERY]
    before = delta.grid.module.filters(torch.zeros(1, dtype=torch.float64))
    model.to(torch.bfloat16).double()
    assert torch.equal(delta.grid.module.filters(torch.zeros(1, dtype=torch.float64)), before)
    exact = torch.tensor([pywt.Wavelet("db2").rec_lo, pywt.Wavelet("db2").rec_hi], dtype=torch.float64)
    assert torch.allclose(before[:, 0], exact, atol=2**-53)


@pytest.mark.parametrize("wavelet", ["db1", "db4"])
def test_half_precision_computes_in_float32(wavelet: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = settled("bert").to(dtype)
        inlay.attach(model, WaveFT(n_frequency=4, init="normal", wavelet=wavelet, targets=("query",)))
        delta: Any = deltas_of(model)[QUERY]
        assert delta.grid.module.few
        x = torch.randn(3, 32).to(dtype)
        found = delta.effect(x)
        assert found.dtype == dtype
        assert distance(found.float(), F.linear(x.float(), delta.product(torch.zeros(())))) < 1e-2


def test_zeros_start_at_the_base_and_normal_does_not() -> None:
    model = settled("bert")
    batch = batch_for(model)
    before = model(**batch).logits
    inlay.attach(model, WaveFT(n_frequency=200), "zeros")
    assert torch.equal(model(**batch).logits, before)
    inlay.attach(model, WaveFT(n_frequency=200, init="normal"), "normal")
    assert distance(model(**batch).logits, before) > 1e-3
    assert not WaveFT(init="normal").starts_as_identity


def test_shares_in_proportion_keep_the_sum_and_give_every_layer_one() -> None:
    model = settled("llama")
    method = WaveFT(n_frequency=90, proportional=True, targets=("query", "value", "up"))
    plan = inlay.attach(model, method)
    counts = {path.split(".")[-1]: len(d.spectrum) for path, d in deltas_of(model).items()}  # type: ignore[union-attr, arg-type]
    sizes = {"q_proj": 32 * 32, "v_proj": 16 * 32, "up_proj": 48 * 32}
    assert counts == {name: round(270 * size / sum(sizes.values())) for name, size in sizes.items()}
    assert plan.parameters == 2 * sum(counts.values())
    small = WaveFT(n_frequency=1, proportional=True, targets=("value", "head"))
    assert min(small.counts(inlay.plan(build("llama"), small).parts[0].sites)) == 1  # type: ignore[arg-type]


def test_roberta_base_count() -> None:
    with torch.device("meta"):
        model = build("roberta", hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    assert inlay.plan(model, WaveFT()).parameters == 24 * 2592


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no discrete wavelet of that name(?s:.*)wavelet='db99'"):
        WaveFT(wavelet="db99")
    with pytest.raises(
        ConfigError, match=r"n_frequency is larger than what it(?s:.*)2592(?s:.*)at most 1024"
    ):
        inlay.attach(build("bert"), WaveFT())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_learns(family: str) -> None:
    model = settled(family)
    inlay.attach(model, WaveFT(n_frequency=300, targets=("linear",)), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True), steps=100)
    assert before > 0.5
    assert after < 0.1 * before
    inlay.check_training(model)
