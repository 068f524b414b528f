"""RandLoRA: the sum written out, its own backward, the frozen bases, full rank, counts, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import agrees
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError
from inlay.stack import need_state
from inlay.testing.layers import deltas_of, fit, settled
from inlay.testing.models import batch_for, build
from inlay.testing.tools import shake
from inlay_reparam import RandLoRA
from inlay_reparam.randlora import BySmaller, scaled


def bases_of(model: nn.Module) -> Any:
    (found,) = need_state(model).placed.values()
    return found.adapter.shared["common"]


def total(delta: Any, bases: Any, weight: Tensor) -> Tensor:
    """Σ over m of column m of B's side times row m of A's: (n, j) = divmod(m, r), (j', n') = divmod(m, N)."""
    small, large = sorted(weight.shape)
    r, N = delta.scales.shape
    found = torch.zeros(large, small, dtype=weight.dtype)
    for m in range(r * N):
        (n, j), (row, base) = divmod(m, r), divmod(m, N)
        side = delta.scales[row, base] * bases.A[row, :small] * delta.gains[base]
        found = found + torch.outer(bases.B[:large, n, j], side)
    return found if weight.shape == found.shape else found.T


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_layer_is_its_dense_form(family: str) -> None:
    """Layers of (32, 32), (16, 32), (32, 48) and (48, 32): square, wide and tall; 5 divides none of them."""
    model = settled(family)
    method = RandLoRA(rank=5, alpha=3.0, targets=("query", "value", "up", "down"))

    def written(delta: Any, weight: Tensor) -> Tensor:
        return weight + 3 / 5 * total(delta, bases_of(model), weight)

    agrees(model, method, written)


@pytest.mark.parametrize("transposed", [True, False])
def test_its_backward_is_autograd_s(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 7) if transposed else (2, 3, 12), (4, 7), (4, 3), (3, 7)]
    x, A, scales, gains = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    inputs = [t.requires_grad_() for t in (x, scales, gains)]
    assert torch.autograd.gradcheck(lambda x, s, g: BySmaller.apply(x, A, s, g, transposed), inputs)
    side = scaled(A, scales, gains)
    plain = x @ (side.T if transposed else side)
    assert torch.allclose(BySmaller.apply(x, A, scales, gains, transposed), plain)


def test_nothing_as_large_as_the_layer_is_kept_for_the_backward() -> None:
    """What is kept, beside the frozen bases, are the input and the two small sides."""
    model = nn.Sequential(nn.Linear(64, 64))
    inlay.attach(model, RandLoRA(rank=8, targets=("0",)))
    shake(model)
    delta: Any = deltas_of(model)["0"]
    x, kept = torch.randn(3, 64, requires_grad=True), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        delta.effect(x)
    frozen = {b.untyped_storage().data_ptr() for b in bases_of(model).buffers()}
    own = [t for t in kept if t.untyped_storage().data_ptr() not in frozen]
    assert own
    assert max(t.numel() for t in own) <= 8 * 64


def test_its_rank_is_full() -> None:
    model = settled("bert")
    inlay.attach(model, RandLoRA(rank=4, targets=("query",)))
    shake(model)
    for delta in deltas_of(model).values():
        product = delta.product(torch.zeros((), dtype=torch.float64)).detach()  # type: ignore[operator]
        assert torch.linalg.matrix_rank(product) == 32


@pytest.mark.parametrize("kind", ["uniform", "sparse", "very_sparse"])
def test_the_frozen_bases(kind: Any) -> None:
    model = build("llama", hidden_size=128, intermediate_size=192)
    inlay.attach(model, RandLoRA(rank=8, bases=kind, targets=("query", "up")), seed=3)
    bases = bases_of(model)
    assert bases.A.shape == (8, 128)
    assert bases.B.shape == (192, 16, 8)
    assert not list(bases.parameters())
    for tensor in (bases.A, bases.B):
        assert float(tensor.std()) == pytest.approx(1, abs=1e-3)
        assert abs(float(tensor.mean())) < 0.1
    values, counts = bases.B.unique(return_counts=True)
    share = {"sparse": 1 / 6, "very_sparse": 0.5 / 128**0.5}.get(kind)
    if share is None:
        assert float(bases.B.abs().max()) == pytest.approx(3**0.5, rel=0.02)
    else:
        assert len(values) == 3
        assert values[1] == 0
        assert [int(counts[0]) / bases.B.numel(), int(counts[2]) / bases.B.numel()] == pytest.approx(
            [share] * 2, rel=0.1
        )


def test_where_it_starts() -> None:
    model = settled("llama")
    batch = batch_for(model, labels=True)
    before = model(**batch).logits
    inlay.attach(model, RandLoRA(rank=3, targets=("query", "down")), seed=0)
    assert torch.equal(model(**batch).logits, before)
    for path, delta in deltas_of(model).items():
        assert not delta.scales.any()  # type: ignore[union-attr, operator]
        assert torch.equal(delta.gains, torch.full((11, 32), 1 / 32)), path
    frozen = copy.deepcopy(bases_of(model))
    model(**batch).loss.backward()
    for delta in deltas_of(model).values():
        assert bool(delta.scales.grad.any())  # type: ignore[union-attr, operator]
        assert not delta.gains.grad.any()  # type: ignore[union-attr, operator]
    fit(model, batch, steps=3)
    assert torch.equal(bases_of(model).B, frozen.B)


@pytest.mark.parametrize("saved", [False, True])
def test_the_file_holds_the_bases_once_or_not_at_all(saved: bool, tmp_path: Path) -> None:
    model = settled("bert", hidden_size=128)
    inlay.attach(model, RandLoRA(rank=64, key=3, save_projection=saved), seed=0)
    shake(model)
    inlay.save(model, tmp_path)
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert (size > 4 * 128 * 128) is saved
    fresh = settled("bert", hidden_size=128)
    inlay.load(fresh, tmp_path)
    batch = batch_for(model)
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)


def test_a_square_layer_of_768_has_19200_parameters() -> None:
    with torch.device("meta"):
        model = build("roberta", hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    assert inlay.plan(model, RandLoRA()).parameters == 24 * 19_200 == 24 * 24 * (32 + 768)


def test_a_rank_larger_than_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank is larger than what it is(?s:.*)rank=17(?s:.*)at most 16"):
        inlay.attach(build("llama"), RandLoRA(rank=17))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_learns(family: str) -> None:
    model = settled(family)
    inlay.attach(model, RandLoRA(rank=8, targets=("linear",)), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True), steps=100)
    assert before > 0.5
    assert after < 0.1 * before
    inlay.check_training(model)
