"""Principal components batch by batch, beside those of all rows at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inlay_lora.pca import IncrementalPCA

WIDTH = 12


def rows(count: int, seed: int = 0) -> Tensor:
    """Return rows (count, 12) around a mean, with variances that halve from feature to feature, turned."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))).Q
    scales = 2.0 ** -torch.arange(WIDTH)
    return 3 + torch.randn(count, WIDTH, generator=generator) * scales.sqrt() @ turn


def incremental(x: Tensor, keep: int, *sizes: int) -> IncrementalPCA:
    pca = IncrementalPCA(keep)
    for part in x.split(list(sizes)):
        pca.update(part)
    return pca


@pytest.mark.parametrize("sizes", [(60,), (20, 20, 20), (1, 2, 3, 54), (13, 1, 46)])
def test_with_nothing_cut_off_it_is_the_svd_of_the_centred_rows(sizes: tuple[int, ...]) -> None:
    x = rows(60)
    pca = incremental(x, WIDTH, *sizes)
    centred = x.double() - x.double().mean(0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(pca.singular.double(), singular, rtol=1e-4, atol=1e-4)
    cosines = (pca.directions.double() * directions).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(WIDTH).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pca.mean, x.mean(0), rtol=1e-5, atol=1e-5)
    shares = singular**2 / centred.square().sum()
    torch.testing.assert_close(pca.explained.double(), shares, rtol=1e-4, atol=1e-5)
    assert pca.rows == 60


def test_explained_is_the_share_of_the_features_summed_population_variance() -> None:
    x = rows(50)
    pca = incremental(x, 3, 25, 25)
    population = x.var(0, unbiased=False).sum()
    torch.testing.assert_close(pca.explained, pca.singular**2 / (50 * population), rtol=1e-5, atol=1e-6)


def test_directions_are_orthonormal_with_their_largest_entry_positive() -> None:
    pca = incremental(rows(60), 5, 30, 30)
    torch.testing.assert_close(pca.directions @ pca.directions.T, torch.eye(5), atol=1e-5, rtol=0)
    largest = pca.directions.gather(1, pca.directions.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_the_first_directions_hardly_depend_on_the_order_of_batches() -> None:
    x = rows(200)
    one, two = incremental(x, 6, 100, 100), incremental(x.flip(0), 6, 100, 100)
    assert (one.directions[:2] * two.directions[:2]).sum(1).abs().min() > 0.999


def test_rows_of_a_plane_are_spanned_by_two_directions() -> None:
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) @ rows(2, seed=5)
    pca = incremental(x, 4, 20, 20)
    centred = x - x.mean(0)
    left = centred - centred @ pca.directions[:2].T @ pca.directions[:2]
    assert left.norm() < 1e-4 * centred.norm()
    assert (pca.explained[2:] < 1e-6).all()
    assert pca.settled(0.99)[2:].all()  # what is nothing has no direction to wait for


def test_it_grows_with_the_rows_and_says_what_moved() -> None:
    pca = IncrementalPCA(8)
    pca.update(rows(3))
    assert pca.directions.shape == (3, WIDTH)
    assert not pca.settled(0.99)[:2].any()
    pca.update(rows(300, seed=1))
    assert pca.directions.shape == (8, WIDTH)
    assert not pca.settled(0.99)[3:].any()  # new
    before = pca.directions.clone()
    pca.update(rows(300, seed=1))
    cosines = (before * pca.directions).sum(1).abs()
    assert torch.equal(pca.settled(0.99), cosines >= 0.99)
    assert pca.settled(0.9)[0]
