"""Quantised layers on the CPU (bitsandbytes, torchao): adapters act, learn, read the weight as it acts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.anatomy import Anatomy
from inlay.backends import backend_of
from inlay.errors import CannotMerge, TrainingError
from inlay.sites import ModuleSite
from inlay.testing.models import batch_for
from inlay.testing.quantised import KINDS, PACKED_SIZES, packed
from inlay.testing.snapshots import digest
from inlay.testing.tools import distance, lively, shake
from inlay.weights import read, tensors_of

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt.*:UserWarning",
    "ignore:.*bitsandbytes..gemv_4bit. an autograd kernel was not registered.*:UserWarning",
)
SIZES = {**PACKED_SIZES, "attention_bias": True}
STACK = "lora(rank=4) + ia3() + dora(rank=2, targets=['output'])"

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def quantised(kind: str, **changes: Any) -> nn.Module:
    return packed("llama", kind, **{**SIZES, **changes})


def quantised_sites(model: nn.Module) -> Iterator[ModuleSite]:
    return (s for s in Anatomy(model).leaves if backend_of(s.module) is not None)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch_for(model)).logits


def adapted(kind: str, stack: str = STACK, *, forward_first: bool = False) -> nn.Module:
    model = quantised(kind)
    if forward_first:
        logits(model)
    inlay.attach(model, stack, seed=1)
    shake(model)
    return model


@EVERY_KIND
@pytest.mark.parametrize("when", ["before a forward", "after a forward"])
def test_the_weight_that_is_read_does_what_the_layer_does(kind: str, when: str) -> None:
    """The first forward rearranges a 4-bit weight; what is read stays what acts."""
    model, plain = quantised(kind), lively("llama", **SIZES)
    if when == "after a forward":
        logits(model)
    sites = list(quantised_sites(model))
    assert len(sites) == 14
    for site in sites:
        weight, bias = read(site)
        assert weight.dtype == torch.float32
        assert weight.shape == (site.out_features, site.in_features)
        x = torch.randn(16, site.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            acts = site.module(x)
        assert distance(nn.functional.linear(x, weight, bias), acts) < KINDS[kind].rounding
        original = plain.get_submodule(site.name).weight
        assert 1e-4 < distance(weight, original) < 0.2  # few bits are not the weight itself, but near it


@EVERY_KIND
def test_reading_before_and_after_the_first_forward_agrees(kind: str) -> None:
    model = quantised(kind)
    before = [read(site)[0].clone() for site in quantised_sites(model)]
    logits(model)
    for old, site in zip(before, quantised_sites(model), strict=True):
        assert distance(read(site)[0], old) < KINDS[kind].rounding


@EVERY_KIND
@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("stack", ["lora(rank=4)", "ia3()", "dora(rank=4)", STACK])
def test_adapters_act_as_on_the_weight_that_is_read(stack: str, forward_first: bool, kind: str) -> None:
    """The same adapters on ordinary layers with the dequantised weights give the same effect."""
    model = adapted(kind, stack, forward_first=forward_first)
    plain = lively("llama", **SIZES)
    with torch.no_grad():
        for site in quantised_sites(quantised(kind)):
            plain.get_submodule(site.name).weight.copy_(read(site)[0])
    base = logits(plain)
    inlay.attach(plain, stack, seed=1)
    shake(plain)
    expected = logits(plain)
    effect = distance(expected, base)
    assert effect > 0.05
    for _ in range(2):  # the second call has packed weights in any case
        assert distance(logits(model), expected) < min(0.1, 0.5 * effect)
    with inlay.use(model):
        assert distance(logits(model), base) < 0.1


@EVERY_KIND
@pytest.mark.parametrize("stack", ["lora(rank=4)", "ia3()", "dora(rank=4)", STACK])
def test_adapters_learn_over_quantised_layers(stack: str, kind: str) -> None:
    model = adapted(kind, stack).train()
    before = digest({n: t for n, t in tensors_of(model).items() if ".inlay." not in n})
    batch = batch_for(model, labels=True)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        inlay.check_training(model, optimizer)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert digest({n: t for n, t in tensors_of(model).items() if ".inlay." not in n}) == before


@pytest.mark.parametrize("kind", ["nf4", "nested nf4"])
def test_training_through_packed_weights_is_refused(kind: str) -> None:
    """bitsandbytes' inference kernel has no backward: gradients below it would be silently wrong.

    (Where a layer has a bias, bitsandbytes itself fails in the forward.)
    """
    model = quantised(kind, attention_bias=False)
    inlay.attach(model, STACK)
    logits(model)
    layers = [m for m in model.modules() if (b := backend_of(m)) and b.inference_only(m)]
    if not layers:
        pytest.skip("this processor has no kernel that packs (AVX512-BF16)")
    model.train()(**batch_for(model, labels=True)).loss.backward()
    with pytest.raises(
        TrainingError, match=r"packed quantised weights for inference(.|\n)*q_proj and 13 more"
    ):
        inlay.check_training(model)


@EVERY_KIND
@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("undo", [True, False])
def test_merging_is_refused_and_changes_nothing(undo: bool, forward_first: bool, kind: str) -> None:
    model = adapted(kind, forward_first=forward_first)
    before = digest(tensors_of(model))
    with pytest.raises(CannotMerge, match=r"layers\.0\.self_attn\.q_proj: it is quantised"):
        inlay.merge(model, undo=undo)
    assert digest(tensors_of(model)) == before


@EVERY_KIND
def test_saving_and_loading_leaves_the_weights_as_they_lie(kind: str, tmp_path: Path) -> None:
    """bitsandbytes' own `state_dict()` repacks in place, with loss: saving an adapter must not ask for it."""
    model = adapted(kind)
    expected = logits(model)
    inlay.save(model, tmp_path)
    assert torch.equal(logits(model), expected)
    for used in (False, True):
        fresh = quantised(kind)
        if used:
            logits(fresh)  # packed weights have other shapes, and are still the same base
        inlay.load(fresh, tmp_path)
        assert torch.equal(logits(fresh), expected)


def test_an_adapter_trained_over_few_bits_loads_onto_the_full_base(tmp_path: Path) -> None:
    """The way to a merged model: the base in full precision has the shapes that the bits stand for."""
    model = adapted("nf4")
    inlay.save(model, tmp_path)
    full = lively("llama", **SIZES)
    with pytest.warns(UserWarning, match="weights: other values"):
        inlay.load(full, tmp_path)
    unmerged = logits(full)
    assert distance(unmerged, logits(lively("llama", **SIZES))) > 0.05
    inlay.merge(full, undo=False)
    assert distance(logits(full), unmerged) < 1e-5


@EVERY_KIND
@pytest.mark.parametrize("forward_first", [False, True])
def test_detaching_gives_the_quantised_model_back(forward_first: bool, kind: str) -> None:
    model, plain = adapted(kind, forward_first=forward_first), quantised(kind)
    logits(model)
    inlay.detach(model)
    assert torch.equal(logits(model), logits(plain))
    assert [type(s.module) for s in quantised_sites(model)] == [
        type(s.module) for s in quantised_sites(plain)
    ]


@EVERY_KIND
def test_a_copy_of_an_adapted_quantised_model_does_the_same(kind: str) -> None:
    model = adapted(kind)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    shake(twin, seed=3)
    assert distance(logits(twin), logits(model)) > 0.01


@EVERY_KIND
def test_routes_over_quantised_layers(kind: str) -> None:
    model = adapted(kind, "lora(rank=4)")
    inlay.attach(model, "ia3()", name="second", activate=False)
    shake(model, "second", seed=2)
    with inlay.route(model, ["default", None, "second"]):
        together = logits(model)
    for row, name in enumerate(["default", None, "second"]):
        with inlay.use(model, *([name] if name else [])):
            assert distance(together[row], logits(model)[row]) < 1e-5


def test_a_bias_that_the_first_call_casts_is_the_same_base(tmp_path: Path) -> None:
    """A layer that computes in fewer bits than its bias has gives it these for good, when it is called."""
    models = [quantised("nf4") for _ in range(2)]
    for model in models:
        for site in quantised_sites(model):
            site.module.compute_dtype = torch.bfloat16
            if site.module.bias is not None:
                site.module.bias.data = torch.linspace(0.1, 0.7, len(site.module.bias))
    inlay.attach(models[0], "lora(rank=2)")
    models[0].train()(**batch_for(models[0]))
    assert models[0].model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16  # type: ignore[union-attr]
    inlay.save(models[0], tmp_path)
    inlay.load(models[1], tmp_path)  # would warn of another base
