"""Starting points beside huggingface/peft's: the same function and the same product B₀A₀ at the start."""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.testing.layers import deltas_of, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance
from inlay_lora import EVA, CorDA, LoRA, LoRAGA, OLoRA, Orthogonal, PiSSA

peft = pytest.importorskip("peft")

from layer_methods import LINEAR  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STILL = {
    "llama": {},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
EVERY_FAMILY = pytest.mark.parametrize("family", STILL)


def data_of(family: str, count: int = 1, rows: int = 1) -> list[dict[str, Any]]:
    model = settled(family)
    return [batch_for(model, rows=rows, length=40, labels=True, seed=seed) for seed in range(count)]


def theirs(family: str, init: Any, data: list[Any] | None = None, **settings: Any) -> nn.Module:
    """Return a model adapted by peft, as it starts."""
    model = settled(family, **STILL[family])
    settings = {"r": 8, "lora_alpha": 12, "target_modules": LINEAR[family], **settings}
    config = peft.LoraConfig(init_lora_weights=init, lora_dropout=0.0, **settings)
    if init == "corda":
        # All that peft takes from attrs, which need not be installed, is what the standard library has too.
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "attr", dataclasses)
            from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config, run_model=lambda: [model(**call) for call in data or []])
    if init == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(model, config, lambda: [model(**call).loss.backward() for call in data or []])
    adapted = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    if init == "eva":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.initialize_lora_eva_weights(adapted, data, show_progress_bar=False)
    return adapted.eval()


def ours(family: str, start: Any, data: list[Any] | None = None, **settings: Any) -> nn.Module:
    model = settled(family, **STILL[family])
    settings = {"rank": 8, "alpha": 12, "targets": LINEAR[family], **settings}
    inlay.attach(model, LoRA(start=start, **settings), data=data, seed=0)
    return model


def factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return A₀, B₀ and s of each layer that peft adapted."""
    return {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight.detach(),
            module.lora_B["default"].weight.detach(),
            module.scaling["default"],
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def same_products(family: str, other: nn.Module, model: nn.Module, tolerance: float) -> None:
    deltas, found = deltas_of(model), factors(other)
    assert deltas.keys() == found.keys()
    for name, (down, up, s) in found.items():
        delta = deltas[name]
        assert delta.scale == s
        assert distance(delta.up @ delta.down, up @ down) < tolerance, name


@torch.no_grad()
def same_start(family: str, other: nn.Module, model: nn.Module, tolerance: float = 1e-4) -> None:
    """Both are the base's function: peft's by a changed base, ours without."""
    batch, base = data_of(family)[0], settled(family)
    expected = base(**batch).logits
    assert distance(other(**batch).logits, expected) < tolerance
    assert torch.equal(model(**batch).logits, expected)
    inlay.detach(model)
    assert all(torch.equal(t, base.state_dict()[name]) for name, t in model.state_dict().items())


@EVERY_FAMILY
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_pissa(family: str, settings: dict[str, Any]) -> None:
    other = theirs(family, "pissa", **settings)
    model = ours(family, PiSSA(), scaling="rsqrt" if settings else "standard")
    same_products(family, other, model, 1e-4)
    same_start(family, other, model)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_olora(family: str) -> None:
    other, model = theirs(family, "olora"), ours(family, OLoRA())
    same_products(family, other, model, 1e-4)
    same_start(family, other, model)


@torch.no_grad()
def test_olora_of_peft_is_wrong_on_layers_stored_transposed() -> None:
    """It decomposes Wᵀ: an error of shapes in general, another function than the base's where W is square."""
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
        theirs("gpt2", "olora", target_modules=["c_fc"])(**data_of("gpt2")[0])
    square = {"target_modules": ["attn.c_proj"]}
    other, model = theirs("gpt2", "olora", **square), ours("gpt2", OLoRA(), targets=["attn.c_proj"])
    batch, base = data_of("gpt2")[0], settled("gpt2")
    assert distance(other(**batch).logits, base(**batch).logits) > 1e-2
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    delta = deltas_of(model)["transformer.h.0.attn.c_proj"]
    weight = base.get_submodule("transformer.h.0.attn.c_proj").weight.T
    q = torch.linalg.qr(weight).Q[:, :8]
    assert distance(delta.up @ delta.down, q @ q.T @ weight) < 1e-5


@EVERY_FAMILY
@torch.no_grad()
def test_orthogonal(family: str) -> None:
    """Random in both: the same laws. Neither product is more than rounding."""
    torch.manual_seed(0)
    other, model = theirs(family, "orthogonal"), ours(family, Orthogonal())
    batch = data_of(family)[0]
    expected = settled(family)(**batch).logits
    for adapted in (other, model):
        assert distance(adapted(**batch).logits, expected) < 1e-5
    deltas = deltas_of(model)
    for name, (down, up, _) in factors(other).items():
        assert deltas[name].down.std() == pytest.approx(float(down.std()), rel=0.3)
        assert deltas[name].up.std() == pytest.approx(float(up.std()), rel=0.3)


@EVERY_FAMILY
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(family: str, mode: str) -> None:
    """One sample: what each divides it by, peft by |max|, scales C alone, and not the product."""
    data = data_of(family)
    other = theirs(family, "corda", data, corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode))
    model = ours(family, CorDA(mode=mode), data)  # type: ignore[arg-type]
    same_products(family, other, model, 2e-2 if mode == "kpm" else 1e-3)
    same_start(family, other, model, 1e-3)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("scale", ["stable", "unit", "gd"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_of_peft_s_variant(family: str, direction: Any, scale: Any) -> None:
    """At rank 8 both take all directions of these layers, so that no randomness is left."""
    data = data_of(family, 2, rows=20)  # of few samples the last block's gradients have few directions
    named = {"stable": "stable", "unit": "unit", "gd": "gd_scale"}[scale]
    config = peft.tuners.lora.config.LoraGAConfig(direction=direction, scale=named)
    other = theirs(family, "lora_ga", data, lora_ga_config=config)
    model = ours(family, LoRAGA(variant="peft", direction=direction, scale=scale), data)
    for name, (down, up, _) in factors(other).items():  # the signs of singular vectors are anyone's
        assert distance(deltas_of(model)[name].down.abs(), down.abs()) < 1e-2
        assert distance(deltas_of(model)[name].up.abs(), up.abs()) < 1e-2
    same_start(family, other, model)
    reference = ours(family, LoRAGA(direction=direction, scale=scale), data)
    name, (down, up, _) = next(iter(factors(other).items()))
    delta = deltas_of(reference)[name]
    assert distance(delta.up.norm(dim=0), up.norm(dim=0)) > 0.3  # another method under one name


def test_lora_ga_of_peft_scales_layers_stored_transposed_by_their_input() -> None:
    data = data_of("gpt2")
    other = theirs("gpt2", "lora_ga", data, lora_ga_config=peft.tuners.lora.config.LoraGAConfig())
    deltas = deltas_of(ours("gpt2", LoRAGA(variant="peft"), data))
    for name, (down, up, _) in factors(other).items():
        out, width = up.shape[0], down.shape[1]
        expected = up.abs() * (out / width) ** 0.25
        assert distance(deltas[name].up.abs(), expected) < 1e-2


def rows_of(family: str, whiten: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    data = [batch_for(settled(family), rows=6, length=20)]
    targets = LINEAR[family]
    config = peft.tuners.lora.config.EvaConfig(rho=1.0, whiten=whiten)
    other = theirs(family, "eva", data, r=3, target_modules=targets, eva_config=config)
    model = ours(family, EVA(rho=1.0, whiten=whiten), copy.deepcopy(data), rank=3, targets=targets)
    return {n: f[0] for n, f in factors(other).items()}, {n: d.down for n, d in deltas_of(model).items()}


@EVERY_FAMILY
def test_eva(family: str) -> None:
    """Nearly: peft's decomposition is a randomised one."""
    other, own = rows_of(family, whiten=False)
    assert other.keys() == own.keys()
    for name, rows in other.items():
        torch.testing.assert_close((rows * own[name]).sum(1).abs(), torch.ones(3), atol=0.1, rtol=0)


def test_eva_of_peft_whitens_what_layers_share_once_for_each() -> None:
    other, own = rows_of("bert", whiten=True)
    for name, rows in other.items():
        shared = name.endswith((".query", ".key", ".value"))
        expected = own[name].norm(dim=1) ** (3 if shared else 1)
        torch.testing.assert_close(rows.norm(dim=1), expected, rtol=5e-2, atol=0)
