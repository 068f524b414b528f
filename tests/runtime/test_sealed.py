"""Layers of a quantiser that no backend knows (HQQ): deltas act; what needs the weight is refused."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay import backends
from inlay.errors import AttachError, CannotMerge, RegistryError
from inlay.testing.models import batch_for
from inlay.testing.quantised import PACKED_SIZES
from inlay.testing.refusal import refused
from inlay.testing.snapshots import digest
from inlay.testing.tools import distance, lively, shake
from inlay.weights import tensors_of

hqq = pytest.importorskip("hqq.core.quantize")
pytest.importorskip("transformers")

QUERY = "model.layers.0.self_attn.q_proj"
SIZES = {**PACKED_SIZES, "attention_bias": True}
STACK = "lora(rank=4) + ia3() + serial_adapter() + prefix_tuning(length=3, hidden=8)"


def half_quadratic(**changes: Any) -> nn.Module:
    """Return a Llama whose linear layers but the head are HQQ's, in 4 bits."""
    hqq.HQQLinear.set_backend(hqq.HQQBackend.PYTORCH)
    model = lively("llama", **SIZES, **changes).requires_grad_(False)
    how = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            made = hqq.HQQLinear(layer, how, compute_dtype=torch.float32, device="cpu")
            setattr(model.get_submodule(parent), leaf, made)
    return model.eval()


def dequantised() -> nn.Module:
    """Return the same model with ordinary layers of the weights that HQQ's bits stand for."""
    model, packed = lively("llama", **SIZES), half_quadratic()
    with torch.no_grad():
        for name, layer in packed.named_modules():
            if isinstance(layer, hqq.HQQLinear):
                model.get_submodule(name).weight.copy_(layer.dequantize())
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch_for(model)).logits


def adapted(model: nn.Module, stack: str = STACK) -> nn.Module:
    inlay.attach(model, stack, seed=1)
    shake(model)
    return model


def test_the_layers_are_no_linear_layers_and_have_no_weight() -> None:
    layer = half_quadratic().get_submodule(QUERY)
    assert not isinstance(layer, nn.Linear)
    assert not hasattr(layer, "weight")
    assert isinstance(backends.backend_of(layer), backends.Sealed)


@pytest.mark.parametrize("stack", ["lora(rank=4)", "ia3()", "serial_adapter()", "bitfit()", STACK])
def test_changes_of_what_layers_give_and_read_act_as_on_the_weights_themselves(stack: str) -> None:
    model, plain = adapted(half_quadratic(), stack), adapted(dequantised(), stack)
    assert distance(logits(model), logits(plain)) < 1e-5
    assert distance(logits(model), logits(half_quadratic())) > 0.05
    batch = batch_for(model, labels=True)
    for each in (model, plain):
        each(**batch).loss.backward()
    inlay.check_training(model)
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert distance(parameter.grad, theirs[name]) < 1e-4, name  # type: ignore[arg-type]


def test_save_load_route_and_detach(tmp_path: Path) -> None:
    model, plain = adapted(half_quadratic()), half_quadratic()
    expected, bits = logits(model), digest(tensors_of(plain))
    inlay.save(model, tmp_path)
    fresh = half_quadratic()
    inlay.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), expected)
    with inlay.route(model, ["default", None, "default"]):
        assert distance(logits(model)[1:2], logits(plain)[1:2]) < 1e-5
    inlay.detach(model)
    assert torch.equal(logits(model), logits(plain))
    assert digest(tensors_of(model)) == bits
    assert type(model.get_submodule(QUERY)) is hqq.HQQLinear


def test_a_method_that_needs_the_weight_is_refused_by_name() -> None:
    model = half_quadratic()
    match = (
        rf"'default/dora' needs the weight of a layer that no backend can read[\s\S]*{QUERY}, "
        r"a hqq\.core\.quantize\.HQQLinear"
    )
    with refused(AttachError, match):
        inlay.attach(model, "lora(rank=4) + dora(rank=4)")
    assert not any("inlay" in name for name, _ in model.named_modules())


def test_training_a_layers_own_values_is_refused_by_name() -> None:
    model = half_quadratic()
    match = rf"the weight of a quantised layer cannot be read[\s\S]*{QUERY}, a hqq\.core\.quantize\.HQQLinear"
    with refused(AttachError, match) as caught:
        inlay.attach(model, "lora(rank=4)", train=("query",))
    assert any("'trained'" in note for note in caught.error.__notes__)


@pytest.mark.parametrize("how", [None, "dequantise", "requantise"])
def test_merging_is_refused_whatever_is_asked_for(how: str | None) -> None:
    model = adapted(half_quadratic(), "lora(rank=4)")
    bits = digest(tensors_of(model))
    with refused(CannotMerge, rf"{QUERY}: it is a quantised HQQLinear, and no backend can read its weight"):
        inlay.merge(model, quantised=how)
    assert digest(tensors_of(model)) == bits


# -- a backend from a stranger's package ---------------------------------------------------------

STRANGER = """
    import copy
    from hqq.core.quantize import HQQLinear, Quantizer
    from inlay.backends import Backend

    class Hqq(Backend):
        def handles(self, module):
            return isinstance(module, HQQLinear)

        def dequantize(self, module):
            return module.dequantize().detach()

        def requantize(self, module, weight):
            how = {k: v for k, v in module.quant_config["weight_quant_params"].items()}
            bits, meta = Quantizer.quantize(
                weight, device="cpu", compute_dtype=module.compute_dtype, **how
            )
            old = module.meta
            meta.update({k: old[k] for k in ("quant_scale", "quant_zero", "compute_dtype") if k in old})
            return {"W_q": type(module.W_q)(bits, requires_grad=False), "meta": meta}

        def compute_dtype(self, module):
            return module.compute_dtype
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that puts a distribution with a backend on sys.path."""

    def install(distribution: str, code: str, **entries: str) -> None:
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{backends.GROUP}]", *lines]) + "\n")
        (folder / f"{distribution.replace('-', '_')}.py").write_text(textwrap.dedent(code))
        monkeypatch.syspath_prepend(folder)
        forget()

    def forget() -> None:
        backends._packages.cache_clear()
        backends._loaded.cache_clear()

    yield install
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("how", ["dequantise", "requantise"])
def test_with_a_strangers_backend_everything_works(how: str, install: Any) -> None:
    install("acme-hqq", STRANGER, hqq="acme_hqq:Hqq")
    stack = "lora(rank=4) + dora(rank=2, targets=['query', 'output'])"
    model, plain = adapted(half_quadratic(), stack), adapted(dequantised(), stack)
    expected = logits(model)
    assert distance(expected, logits(plain)) < 1e-5
    bits = digest(tensors_of(model))
    report = inlay.merge(model, quantised=how)
    assert distance(logits(model), expected) < (1e-5 if how == "dequantise" else 0.5)
    kind = nn.Linear if how == "dequantise" else hqq.HQQLinear
    assert isinstance(model.get_submodule(QUERY), kind)
    assert (max(s.noise for s in report.sites) > 1e-3) == (how == "requantise")
    inlay.unmerge(model)
    assert torch.equal(logits(model), expected)
    assert digest(tensors_of(model)) == bits


def test_two_packages_with_a_backend_for_one_library_are_refused(install: Any) -> None:
    install("acme-hqq", STRANGER, hqq="acme_hqq:Hqq")
    install("other-hqq", STRANGER, hqq="other_hqq:Hqq")
    with refused(RegistryError, r"backend 'hqq' is offered more than once[\s\S]*acme-hqq 1\.0"):
        inlay.attach(half_quadratic(), "lora(rank=4)")


def test_a_backend_that_fails_to_import_is_named(install: Any) -> None:
    install("broken-hqq", "1 / 0", hqq="broken_hqq:Hqq")
    with refused(
        RegistryError, r"the backend 'hqq' failed to import[\s\S]*ZeroDivisionError[\s\S]*broken-hqq 1\.0"
    ):
        inlay.attach(half_quadratic(), "lora(rank=4)")
