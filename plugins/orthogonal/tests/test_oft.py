"""OFT: the formula, how orthogonal it is, where it stands, counts, its limits, and that it learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rotations import SITES, Layer, adapted, check_layer, exact, placed_at, plain, series, skew_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import fit, settled, watch
from inlay.testing.models import batch_for, build
from inlay.testing.tools import distance, shake
from inlay_orthogonal import OFT

METHODS = [
    OFT(block_size=8),
    OFT(block_size=4, terms=5),
    OFT(block_size=8, cayley="exact"),
    OFT(block_size=16, cayley="exact", shared=True),
]


def rotation(method: OFT, triangles: Tensor, width: int) -> Tensor:
    """Return R (width, width) of stored triangles."""
    skews = [skew_of(t, method.block_size) for t in triangles]
    blocks = [exact(s) if method.cayley == "exact" else series(s, method.terms) for s in skews]
    return torch.block_diag(*(blocks * (width // method.block_size) if method.shared else blocks))


@pytest.mark.parametrize("family", SITES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_layer_is_the_formula(method: OFT, family: str) -> None:
    def change(tensors: dict[str, Tensor], layer: Layer) -> Layer:
        weight, bias = layer
        return weight @ rotation(method, tensors["skew"], weight.shape[1]).T, bias

    check_layer(family, lambda role: dataclasses.replace(method, targets=[role]), change)


def test_slices_of_a_fused_projection_turn_for_themselves() -> None:
    method = OFT(block_size=8)
    model = adapted("gpt2", method)
    path = "transformer.h.0.attn.c_attn"
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    weight, bias = plain(model.get_submodule(path))
    parts = list(weight.split(32))
    for i, role in ((0, "query"), (2, "value")):
        (delta,) = placed_at(model, f"{path}[{role}]")
        parts[i] = parts[i] @ rotation(method, delta.rotation.skew.detach(), 32).T
    assert distance(model.get_submodule(path)(x), F.linear(x, torch.cat(parts), bias)) < 1e-12
    inlay.merge(model, undo=False)
    assert distance(plain(model.get_submodule(path))[0], torch.cat(parts)) < 1e-12


def test_a_convolution_turns_its_kernel() -> None:
    method = OFT(block_size=8, targets=["patch_embeddings.projection"])
    model = adapted("vit", method)
    path = "vit.embeddings.patch_embeddings.projection"
    (delta,) = placed_at(model, path)
    conv = model.get_submodule(path)
    turned = conv.weight.flatten(1) @ rotation(method, delta.rotation.skew.detach(), 48).T
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = F.conv2d(x, turned.view_as(conv.weight), conv.bias, stride=conv.stride)
    assert distance(conv(x), expected) < 1e-12
    inlay.merge(model, undo=False)
    assert distance(model.get_submodule(path).weight, turned.view_as(conv.weight)) < 1e-12


def test_overlapping_kernels_with_padding_start_at_the_base_and_merge() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten()).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    before = model(x)
    inlay.attach(model, OFT(block_size=6, targets=["0"]), seed=0)
    assert torch.equal(model(x), before)
    shake(model)
    turned = model(x)
    assert distance(turned, before) > 0.05
    inlay.merge(model, undo=False)
    assert distance(model(x), turned) < 1e-12


def test_an_embedding_turns_its_rows() -> None:
    method = OFT(block_size=8, targets=["embedding"])
    model = adapted("bert", method)
    path = "bert.embeddings.word_embeddings"
    (delta,) = placed_at(model, path)
    ids = torch.randint(3, 60, (2, 5))
    _, y = watch(model, path, {"input_ids": ids})
    r = rotation(method, delta.rotation.skew.detach(), 32)
    assert distance(y, model.get_submodule(path).weight[ids] @ r) < 1e-12


def test_merged_rows_keep_their_norms_and_angles() -> None:
    model = adapted("llama", OFT(block_size=8, cayley="exact", targets=["down"]))
    path = "model.layers.0.mlp.down_proj"
    before = plain(model.get_submodule(path))[0].clone()
    inlay.merge(model, undo=False)
    after = plain(model.get_submodule(path))[0]
    assert distance(after, before) > 0.1
    assert distance(after @ after.T, before @ before.T) < 1e-12


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 6])
def test_how_orthogonal_the_series_is(terms: int) -> None:
    """R Rᵀ = I − S^(2T−2) for even T, (I − S^(T−1))² for odd: the default T is even."""
    model = nn.Sequential(nn.Linear(8, 3)).double()
    inlay.attach(model, OFT(block_size=8, terms=terms, targets=["0"]), seed=0)
    shake(model)
    (delta,) = placed_at(model, "0")
    one = torch.eye(8, dtype=torch.float64)
    r = one + delta.rotation(one).detach()
    s = skew_of(delta.rotation.skew.detach()[0], 8)
    power = torch.linalg.matrix_power
    odd = one - power(s, terms - 1)
    assert distance(r @ r.T, odd @ odd if terms % 2 else one - power(s, 2 * terms - 2)) < 1e-12
    assert OFT().terms % 2 == 0


def test_counts() -> None:
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(hidden_size=4096, num_hidden_layers=1))
        bert = BertForSequenceClassification(BertConfig())
    assert inlay.plan(llama, OFT(targets=["query"])).parameters == 63_488
    assert inlay.plan(llama, OFT(targets=["query"], shared=True)).parameters == 32 * 31 // 2
    assert inlay.plan(bert, OFT(targets=["embedding"])).parameters == 768 * 31 // 2


def test_blocks_that_do_not_fit_are_refused() -> None:
    model = settled("llama")
    with pytest.raises(ConfigError, match=r"block_size=32 does not divide the features of a layer") as error:
        inlay.attach(model, OFT(targets=["linear"]))
    assert "down_proj has 48" in error.value.saw
    assert "2, 3, 4, 6, 8, 12, 16, 24, 48" in error.value.do


def test_dropout_has_no_place_at_a_convolution() -> None:
    with pytest.raises(ConfigError, match="dropout has no weight form"):
        inlay.attach(settled("vit"), OFT(block_size=8, dropout=0.5, targets=["patch_embeddings.projection"]))


def test_dropout_leaves_that_many_blocks_unturned() -> None:
    model = nn.Sequential(nn.Linear(32, 3))
    inlay.attach(model, OFT(block_size=4, dropout=0.4, targets=["0"]), seed=0)
    shake(model)
    (delta,) = placed_at(model, "0")
    for training, unturned in ((True, 3), (False, 0)):  # ⌊0.4 · 8⌋
        change = delta.train(training).rotation(torch.eye(32)).detach()
        blocks = [change[i : i + 4, i : i + 4] for i in range(0, 32, 4)]
        assert sum(not block.any() for block in blocks) == unturned


def test_the_constraint_is_part_of_the_formula() -> None:
    """Both triangles of a block count, k is the number of stored blocks, and nothing is written back."""
    model = nn.Sequential(nn.Linear(16, 3)).double()
    inlay.attach(model, OFT(block_size=8, epsilon=0.2, cayley="exact", targets=["0"]), seed=0)
    shake(model, size=2)
    (delta,) = placed_at(model, "0")
    stored, radius = delta.rotation.skew, 0.2 / 2**0.5
    with torch.no_grad():
        stored[1] *= 1e-3
    start = stored.detach().clone()
    skews = [skew_of(t, 8) for t in start]
    assert skews[0].norm() > radius > skews[1].norm()
    skews[0] = skews[0] * radius / skews[0].norm()
    x = torch.randn(4, 16, dtype=torch.float64)
    y = model(x)
    assert distance(y, model[0].bias + x @ torch.block_diag(*map(exact, skews)) @ model[0].weight.T) < 1e-12
    y.square().sum().backward()
    assert torch.equal(stored, start)
    assert float((stored.grad[0] * start[0]).sum()) == pytest.approx(0, abs=1e-9)


def test_small_turns_survive_in_bfloat16() -> None:
    model = build("llama", dtype=torch.bfloat16)
    inlay.attach(model, OFT(block_size=8), seed=0)
    (delta,) = placed_at(model, "model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        delta.rotation.skew.fill_(1e-4)
    change = delta.rotation(torch.eye(32, dtype=torch.bfloat16)).detach()
    assert float((change[0, 1].float() - 2e-4).abs()) < 2e-6


@pytest.mark.parametrize(
    ("setting", "value"), [("block_size", 1), ("terms", 1), ("epsilon", 0), ("cayley", "no")]
)
def test_settings_are_checked(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{setting}={value!r}"):
        OFT(**{setting: value})


def test_it_learns() -> None:
    model = settled("bert")
    inlay.attach(model, OFT(block_size=16, targets=["linear"]), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert after < 0.1 * before
    inlay.check_training(model)
