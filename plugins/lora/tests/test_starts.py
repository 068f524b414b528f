"""Where factors start, drawn or made from the layer's weight; what a kept start keeps, and gives away."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.errors import ConfigError
from inlay.testing.effects import output
from inlay.testing.layers import deltas_of, fit, settled, watch
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay.testing.snapshots import differences, snapshot
from inlay.testing.tools import distance, shake
from inlay_lora import DoRA, LoRA, LoRAGA, OLoRA, Orthogonal, PiSSA, plain
from inlay_lora.start import Start

ALL = ["query", "key", "value", "output", "up", "down"]
KEPT = [PiSSA(), PiSSA(niter=4), OLoRA()]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return W (out, in) in float64 of each site of the only adapter, cut by hand."""
    found = {}
    for name in deltas_of(model):
        path, _, role = name.partition("[")
        layer = model.get_submodule(path)
        weight = layer.weight.detach().double()
        weight = weight.T if type(layer).__name__ == "Conv1D" else weight
        rows = {"query]": slice(0, 32), "key]": slice(32, 64), "value]": slice(64, 96)}
        found[name] = weight[rows.get(role, slice(None))]
    return found


def product(delta: Any) -> Tensor:
    """Return s·B₀A₀ (out, in) from what an adapter keeps of its start."""
    return delta.scale * delta.up_start.double() @ delta.down_start.double()


def attached(family: str, start: Start, **settings: Any) -> nn.Module:
    model = settled(family)
    inlay.attach(model, LoRA(start=start, **{"rank": 4, "alpha": 6, "targets": ALL, **settings}), seed=0)
    return model


# -- the values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("scaling", ["standard", "rsqrt"])
def test_pissa_is_the_best_approximation_whatever_s(family: str, scaling: str) -> None:
    model = attached(family, PiSSA(), scaling=scaling)
    for name, weight in weights(model).items():
        delta, singular = deltas_of(model)[name], torch.linalg.svdvals(weight)
        found = product(delta)
        assert (weight - found).norm() == pytest.approx(float(singular[4:].norm()), rel=1e-5)
        assert distance(torch.linalg.svdvals(weight - found)[:-4], singular[4:]) < 1e-4
        assert distance(delta.up.norm(dim=0), delta.down.norm(dim=1)) < 1e-5


def test_pissa_by_a_few_rounds_is_nearly_as_good_and_always_the_same() -> None:
    exact, first, second = (attached("llama", s) for s in (PiSSA(), PiSSA(niter=16), PiSSA(niter=16)))
    for name, weight in weights(exact).items():
        deltas = [deltas_of(m)[name] for m in (exact, first, second)]
        errors = [float((weight - product(d)).norm()) for d in deltas]
        assert errors[1] <= 1.001 * errors[0]
        assert torch.equal(deltas[1].down, deltas[2].down)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_olora_is_the_weight_along_the_first_columns_of_q(family: str) -> None:
    model = attached(family, OLoRA(), alpha=4)
    for name, weight in weights(model).items():
        delta = deltas_of(model)[name]
        torch.testing.assert_close(delta.up.T @ delta.up, torch.eye(4), atol=1e-5, rtol=0)
        assert not delta.down.tril(-1).any()
        q = torch.linalg.qr(weight).Q[:, :4]
        assert distance(product(delta), q @ q.T @ weight) < 1e-5
    assert (
        distance(product(deltas_of(attached(family, OLoRA(), alpha=12))[name]), 3 * q @ q.T @ weight) < 1e-5
    )


def test_orthogonal_halves_have_no_product_and_both_learn() -> None:
    model = settled("bert")
    before = output(model)
    inlay.attach(model, LoRA(rank=6, start=Orthogonal()), seed=0)
    assert distance(output(model), before) < 1e-5
    model(**batch_for(model, labels=True)).loss.backward()
    for delta in deltas_of(model).values():
        assert (delta.up @ delta.down).abs().max() < 1e-5
        assert torch.linalg.matrix_rank(delta.down) == torch.linalg.matrix_rank(delta.up) == 3
        assert delta.down.detach().std() == pytest.approx(0.1 * 0.5**0.5, rel=0.25)
        assert delta.down.grad.any()
        assert delta.up.grad.any()


# -- what a kept start keeps ---------------------------------------------------------------------


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("start", KEPT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_base_stays_and_the_output_is_its_own_to_the_bit(
    method: type, start: Start, dtype: torch.dtype
) -> None:
    model = settled("bert").to(dtype)
    batch = batch_for(model)
    before, plain_output = snapshot(model), model(**batch).logits
    inlay.attach(model, method(rank=4, alpha=6, start=start), seed=0)
    started = model(**batch).logits
    assert torch.equal(started, plain_output) or (method is DoRA and distance(started, plain_output) < 1e-6)
    shake(model)
    assert distance(model(**batch).logits, plain_output) > 0.01
    inlay.detach(model)
    assert not differences(before, model)


def test_forward_gradients_and_merge_are_those_of_the_residual_base() -> None:
    model = attached("bert", PiSSA(), targets=["query"]).double()
    shake(model)
    path = "bert.encoder.layer.0.attention.self.query"
    layer, delta = model.get_submodule(path), deltas_of(model)[path]
    x, y = watch(model, path, batch_for(model))
    down, up = (t.detach().clone().requires_grad_() for t in (delta.down, delta.up))
    residual = layer.weight.detach() - product(delta)
    changed = residual + 1.5 * up @ down
    expected = F.linear(x, changed, layer.bias)
    assert distance(y, expected) < 1e-12
    g = torch.randn_like(y)
    ours = torch.autograd.grad((layer(x) * g).sum(), [delta.down, delta.up])
    for a, b in zip(ours, torch.autograd.grad((expected * g).sum(), [down, up]), strict=True):
        assert distance(a, b) < 1e-12
    inlay.merge(model)
    assert distance(layer.weight, changed) < 1e-12


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_the_part_that_is_the_base_s_sees_no_dropout(method: type) -> None:
    """y = W_res x + s B A drop(x), under DoRA with W_res for W."""
    model = settled("bert")
    inlay.attach(
        model, method(rank=4, alpha=6, dropout=0.5, start=PiSSA(), targets=["query"], layers=[0]), seed=0
    )
    shake(model)
    path = "bert.encoder.layer.0.attention.self.query"
    layer, delta = model.get_submodule(path), deltas_of(model)[path]
    x = watch(model, path, batch_for(model))[0]
    delta.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    kept, start = F.dropout(x, 0.5), product(delta).float()
    residual, change = layer.weight - start, 1.5 * delta.up @ delta.down
    expected = F.linear(x, residual, layer.bias) + F.linear(kept, change)
    if method is DoRA:
        c = (layer.weight.norm(dim=1) + delta.magnitude) / (residual + change).norm(dim=1)
        expected = F.linear(x, residual, layer.bias) + (c - 1) * F.linear(kept, residual)
        expected = expected + c * F.linear(kept, change)
    assert distance(y, expected) < 1e-5


def test_dora_decomposes_the_weight_with_its_start_replaced() -> None:
    model = settled("bert")
    inlay.attach(model, DoRA(rank=4, alpha=6, start=OLoRA(), targets=["query"]), seed=0)
    shake(model)
    path = "bert.encoder.layer.1.attention.self.query"
    layer, delta = model.get_submodule(path), deltas_of(model)[path]
    direction = layer.weight.double() - product(delta) + 1.5 * delta.up.double() @ delta.down.double()
    magnitude = layer.weight.norm(dim=1) + delta.magnitude
    expected = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    x, y = watch(model, path, batch_for(model))
    assert distance(y, F.linear(x, expected.float(), layer.bias)) < 1e-5
    inlay.merge(model)
    assert distance(layer.weight, expected) < 1e-5


def test_its_checkpoint_loads_on_the_untouched_base(tmp_path: Path) -> None:
    model = attached("llama", PiSSA())
    shake(model)
    inlay.save(model, tmp_path)
    fresh = settled("llama")
    assert inlay.load(fresh, tmp_path) == 4 * 12  # A, B, A₀ and B₀ of each layer
    assert torch.equal(output(fresh), output(model))


@pytest.mark.parametrize("scaling", ["standard", "rsqrt"])
def test_as_a_plain_lora_of_twice_the_rank(scaling: str) -> None:
    model = attached("bert", PiSSA(), scaling=scaling)
    assert all(not (f.scale * f.up @ f.down).any() for f in plain(model).values())
    shake(model)
    grown = 2 if scaling == "standard" else 2**0.5
    other = settled("bert")
    inlay.attach(other, LoRA(rank=8, alpha=6 * grown, scaling=scaling, targets=ALL))
    for name, factors in plain(model).items():
        delta, own = deltas_of(other)[name], deltas_of(model)[name]
        assert factors.scale == pytest.approx(delta.scale)
        joined = torch.cat([own.up, -own.up_start], 1) @ torch.cat([own.down, own.down_start])
        assert distance(factors.up @ factors.down, joined) < 1e-5
        delta.begin(factors.down, factors.up)
    assert distance(output(other), output(model)) < 1e-5
    inlay.attach(model, DoRA(rank=2), "dora")
    with refused(ConfigError, r"this change is no plain LoRA\n  saw: dora/dora at .*: Decomposed"):
        plain(model, "dora")


def test_it_loads_onto_a_copy_and_combines_with_itself() -> None:
    model = attached("bert", OLoRA())
    shake(model)
    inlay.combine(model, {"default": 1.0}, name="again")
    for one, two in zip(deltas_of(model).values(), deltas_of(model, "again").values(), strict=True):
        assert torch.equal(one.down_start, two.down_start)
    assert torch.equal(output(copy.deepcopy(model)), output(model))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("start", [*KEPT, Orthogonal()], ids=str)
def test_kernels_start_as_the_matrices_they_are(start: Start) -> None:
    torch.manual_seed(0)
    model, x = Convolutional(), torch.randn(2, 4, 5, 5)
    before = model(x)
    inlay.attach(model, LoRA(rank=4, targets=["conv"], start=start, dropout=0.5), seed=0)
    assert distance(model.eval()(x), before) < 1e-6
    shake(model)
    adapted = model(x)
    assert distance(adapted, before) > 0.01
    assert model.train()(x).shape == adapted.shape
    inlay.merge(model)
    assert distance(model.eval()(x), adapted) < 1e-5


@pytest.mark.parametrize("start", KEPT, ids=str)
def test_it_learns(start: Start) -> None:
    model = settled("bert")
    inlay.attach(model, LoRA(start=start), train=("head",), seed=0)
    before, after = fit(model, batch_for(model, rows=6, labels=True))
    assert after < 0.1 * before


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(rank=3, start=Orthogonal()), r"orthogonal: the rank must be even\n.*rank 3 at .*\n.*4 or 2"),
        (LoRA(rank=1, start=Orthogonal()), r"the rank must be even\n.*\n.*give 2$"),
        (LoRA(start=PiSSA(), targets=["query", "embedding"]), "pissa: this start is for layers, not"),
        (LoRA(rank=33), r"lora: the rank is larger.*\n.*33 at .*, 32 to 32 features\n.*at most 32"),
        (DoRA(rank=33, start=PiSSA()), r"dora: the rank is larger than a layer's"),
        (LoRA(rank=65, targets=["embedding"]), r"rank 65 at .*word_embeddings, 64 to 32 features"),
    ],
)
def test_what_cannot_start_is_refused(method: Any, message: str) -> None:
    model = build("bert")
    with refused(ConfigError, message, model=model):
        inlay.attach(model, method)


def test_a_start_of_one_s_own_needs_an_id_and_factors() -> None:
    with pytest.raises(NotImplementedError):
        Start().measure([], nn.Linear(2, 2), [])
    assert not LoRA().calibrates
    assert LoRA(start=LoRAGA()).calibrates
