"""HRA: the chain of reflections, its compact form, the orthogonalised variant, counts, and that it learns."""

from __future__ import annotations

import pytest
import torch
from rotations import SITES, Layer, adapted, check_layer, placed_at
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import fit, settled
from inlay.testing.models import FAMILIES, batch_for
from inlay.testing.tools import distance, shake
from inlay_orthogonal import HRA


def product(u: Tensor) -> Tensor:
    """Return H₁ … H_r, so that W' = W H₁ … H_r."""
    found = torch.eye(len(u), dtype=u.dtype)
    for column in u.T:
        direction = column / column.norm()
        found = found @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(direction, direction))
    return found


def gram_schmidt(u: Tensor) -> Tensor:
    """Return I − 2 Q Qᵀ, the columns of Q orthogonalised one after the other."""
    done: list[Tensor] = []
    for column in u.T:
        for other in done:
            column = column - (other @ column) * other
        done.append(column / column.norm())
    q = torch.stack(done, 1)
    return torch.eye(len(u), dtype=u.dtype) - 2 * q @ q.T


@pytest.mark.parametrize("family", SITES)
@pytest.mark.parametrize(("form", "rank"), [("chain", 2), ("chain", 6), ("gram_schmidt", 3)])
def test_a_layer_is_the_formula(form: str, rank: int, family: str) -> None:
    def change(tensors: dict[str, Tensor], layer: Layer) -> Layer:
        return layer[0] @ (product if form == "chain" else gram_schmidt)(tensors["u"]), layer[1]

    check_layer(family, lambda role: HRA(rank=rank, form=form, targets=[role]), change)


def test_a_convolution() -> None:
    path = "vit.embeddings.patch_embeddings.projection"
    model = adapted("vit", HRA(rank=4, targets=["patch_embeddings.projection"]))
    (delta,) = placed_at(model, path)
    conv = model.get_submodule(path)
    weight = (conv.weight.flatten(1) @ product(delta.rotation.u.detach())).view_as(conv.weight)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert distance(conv(x), F.conv2d(x, weight, conv.bias, stride=conv.stride)) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_starts_at_the_base_up_to_rounding(family: str) -> None:
    model = settled(family)
    batch = batch_for(model)
    before = model(**batch).logits
    inlay.attach(model, HRA(), seed=0)
    assert distance(model(**batch).logits, before) < 2e-6


def test_the_orthogonalised_form_does_not() -> None:
    model = settled("bert")
    batch = batch_for(model)
    before = model(**batch).logits
    inlay.attach(model, HRA(form="gram_schmidt"), seed=0)
    assert distance(model(**batch).logits, before) > 0.1
    assert HRA().starts_as_identity
    assert not HRA(form="gram_schmidt").starts_as_identity


def test_it_turns_and_its_change_has_the_rank() -> None:
    model = nn.Sequential(nn.Linear(16, 3)).double()
    inlay.attach(model, HRA(rank=4, targets=["0"]), seed=0)
    shake(model)
    (delta,) = placed_at(model, "0")
    one = torch.eye(16, dtype=torch.float64)
    change = delta.rotation(one).detach()
    r = one + change
    assert distance(r @ r.T, one) < 1e-12
    assert float(torch.linalg.det(r)) == pytest.approx(1)
    assert torch.linalg.matrix_rank(change, rtol=1e-9) == 4
    assert distance(one + delta.rotation(one, back=True), r.T) < 1e-12


def test_pairs_part_at_the_first_step() -> None:
    model = settled("bert")
    inlay.attach(model, HRA(rank=2), seed=0)
    model(**batch_for(model, labels=True)).loss.backward()
    gradient = placed_at(model, SITES["bert"][0])[0].rotation.u.grad
    assert distance(gradient[:, 0], gradient[:, 1]) > 0.1


def test_counts() -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    assert inlay.plan(model, HRA(targets=["query"], layers=[0])).parameters == 6_144


def test_the_penalty() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).double()
    inlay.attach(model, HRA(rank=4, penalty=0.5, targets=["0", "1"]), seed=0)
    shake(model)
    expected = 0.0
    for name in ("0", "1"):
        u = placed_at(model, name)[0].rotation.u.detach()
        v = u / u.norm(dim=0)
        expected += 0.5 * float((v.T @ v - torch.eye(4)).square().sum())
    assert float(inlay.auxiliary_loss(model).detach()) == pytest.approx(expected)
    inlay.detach(model)
    inlay.attach(model, HRA(rank=4, targets=["0"]), seed=0)
    assert float(inlay.auxiliary_loss(model).detach()) == 0


def test_odd_chains_and_more_reflections_than_features_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"an odd number of reflections cannot start at the base"):
        HRA(rank=3)
    HRA(rank=3, form="gram_schmidt")
    with pytest.raises(ConfigError, match="more reflections than a layer has features") as error:
        inlay.attach(nn.Sequential(nn.Linear(6, 8)), HRA(rank=8, targets=["0"]))
    assert "0 has 6" in error.value.saw


def test_it_learns() -> None:
    model = settled("bert")
    inlay.attach(model, HRA(), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert after < 0.1 * before
    inlay.check_training(model)
