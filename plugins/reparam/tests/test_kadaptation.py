"""KAdaptation: the sum of Kronecker products, what is shared, counts, and that all of it learns."""

from __future__ import annotations

import pytest
import torch
from dense_checks import adapted, learns, starts_at_the_base
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

import inlay
from inlay.errors import ConfigError
from inlay.testing.layers import deltas_of, gradients, settled, watch
from inlay.testing.models import batch_for
from inlay.testing.tools import distance
from inlay_reparam import KAdaptation

LINEAR = ("linear",)
METHODS = (
    KAdaptation(n=4, scale=3.0, dropout=0.0, targets=LINEAR),
    KAdaptation(n=8, rank=2, targets=LINEAR),
)


def change(delta: nn.Module, scale: float) -> Tensor:
    """Return ΔW (out, in) from the paper's sum, S_i and u_i v_i as matrices."""
    slow = delta.slow.module
    total = sum(
        torch.kron(torch.outer(slow.p[i], slow.t[i]), delta.u[i] @ delta.v[i]) for i in range(len(slow.p))
    )
    return scale * total.T  # type: ignore[union-attr, no-any-return]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_output_and_merge_are_the_formulas(family: str, method: KAdaptation) -> None:
    model = adapted(family, method)
    batch, wanted = batch_for(model), dict[str, tuple[Tensor, Tensor]]()
    for site, delta in deltas_of(model).items():
        layer = model.get_submodule(site)
        dense = change(delta, method.scale).detach()
        c = next(iter(getattr(delta.shared, "module", delta.shared).parameters())).detach()
        assert dense.shape == layer.weight.shape
        assert float(dense.norm()) > 0.01 * float(layer.weight.norm())
        x, y = watch(model, site, batch)
        bias = c if layer.bias is None else layer.bias.detach() + c
        assert distance(y, F.linear(x, layer.weight + dense, bias)) < 1e-9
        wanted[site] = (layer.weight.detach() + dense, bias)
    before = model(**batch).logits
    inlay.merge(model, undo=False)
    for site, (weight, bias) in wanted.items():
        assert distance(model.get_submodule(site).weight, weight) < 1e-9
        assert distance(model.get_submodule(site).bias, bias) < 1e-9
    assert distance(model(**batch).logits, before) < 1e-9


def test_gradients_are_those_of_the_sum() -> None:
    method = KAdaptation(n=4, rank=2, targets=["up"], layers=[0])
    (delta,) = deltas_of(adapted("bert", method)).values()
    tensors = list(delta.reached())
    assert len(tensors) == 5  # p, t, u, v, c
    x = torch.randn(
        3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    found = torch.autograd.grad(delta(x, x, None).square().sum(), [x, *tensors])
    dense = F.linear(x, change(delta, method.scale), delta.shared.bias)
    expected = torch.autograd.grad(dense.square().sum(), [x, *tensors])
    assert all(distance(a, b) < 1e-9 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_starts_exactly_at_the_base(family: str) -> None:
    starts_at_the_base(family, KAdaptation(n=8, targets=LINEAR))


def test_count_of_vit_base() -> None:
    """4,096 + 36,864 + 9,216; the authors' page adds an average head of 29,523 to that."""
    with torch.device("meta"):
        model = ViTModel(ViTConfig())
    shared, fast, biases = 2 * 2 * 32**2, 12 * 2 * (768 + 768), 12 * 768
    assert inlay.plan(model, KAdaptation()).parameters == shared + fast + biases == 50_176


def test_slow_factors_are_one_per_role_and_biases_one_per_layer() -> None:
    model = settled("bert")
    inlay.attach(model, KAdaptation(n=8), seed=0)
    deltas = {name.split("layer.")[1]: d for name, d in deltas_of(model).items()}
    query, other = deltas["0.attention.self.query"], deltas["1.attention.self.query"]
    value = deltas["0.attention.self.value"]
    assert query.slow.module is other.slow.module
    assert query.slow.module is not value.slow.module
    assert value.shared.module is query.shared
    assert isinstance(other.shared, nn.Module)
    named = [
        name
        for name, _ in model.named_parameters()
        if name.endswith((".p", ".t", ".bias")) and "inlay" in name
    ]
    assert len(named) == 4 + 2
    model(**batch_for(model, labels=True)).loss.backward()
    assert query.v.grad.any()
    assert query.shared.bias.grad.any()


def test_every_factor_has_a_gradient_after_one_step() -> None:
    model = settled("bert")
    inlay.attach(model, KAdaptation(n=8), seed=0)
    batch = batch_for(model, labels=True)
    first = gradients(model, batch)
    assert all(g.any() == name.endswith((".v", ".bias")) for name, g in first.items())
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    optimizer.step()
    assert all(g.any() for g in gradients(model, batch).values())


def test_starting_values() -> None:
    model = settled("bert", hidden_size=768, num_hidden_layers=1)
    inlay.attach(model, KAdaptation(targets=["query"]), seed=0)
    (delta,) = deltas_of(model).values()
    slow, bound = delta.slow.module, 2**0.5 * (6 / 25) ** 0.5
    assert all(0.0099 < float(t.detach().abs().max()) <= 0.01 for t in (slow.p, slow.t))
    assert 0.98 * bound < float(delta.u.detach().abs().max()) <= bound
    assert not delta.v.any()


def test_dropout_is_on_the_entries_of_the_change_in_training() -> None:
    method = KAdaptation(n=4, targets=["up"], layers=[0])
    model = adapted("bert", method, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ((site, delta),) = deltas_of(model).items()
    layer = model.get_submodule(site)
    model.train()
    torch.manual_seed(1)
    x, y = watch(model, site, batch_for(model))
    torch.manual_seed(1)
    dense = F.dropout(change(delta, method.scale).contiguous(), 0.5)
    assert distance(y, F.linear(x, layer.weight + dense, layer.bias + delta.shared.bias)) < 1e-9


def test_layers_outside_of_blocks_have_biases_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plan = inlay.attach(model, KAdaptation(n=4, targets=["0", "1"]), seed=0)
    assert plan.parameters == 2 * 16 + 2 * 16 + 2 * 8


def test_sizes_are_checked_before_the_model_is_touched() -> None:
    model = settled("llama")
    with pytest.raises(ConfigError, match=r"n does not divide the layer[\s\S]*n=32; [\s\S]*1, 2, 4, 8, 16\n"):
        inlay.attach(model, KAdaptation())
    assert "_inlay_state" not in vars(model)


@pytest.mark.parametrize(("setting", "value"), [("n", 0), ("rank", 0), ("dropout", 1.0)])
def test_settings_are_checked(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{setting}={value!r}"):
        KAdaptation(**{setting: value})


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_learns(family: str) -> None:
    learns(family, KAdaptation(n=16, targets=LINEAR))
