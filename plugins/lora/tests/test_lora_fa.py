"""LoRA-FA: the frozen factor, what is kept for the backward pass, the corrected gradient, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.testing.layers import deltas_of, fit, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, shake
from inlay_lora import EVA, LoRA, LoRAFA, PiSSA
from inlay_lora.lora_fa import Corrected


def layer_of(method: Any, *, inputs: int = 64) -> nn.Module:
    """Return a plain linear layer inside a module, adapted."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(inputs, 24)})
    model.requires_grad_(False)
    inlay.attach(model, method, seed=0)
    shake(model)
    return model


def kept(model: nn.Module, x: Tensor) -> int:
    """Return how many numbers autograd keeps for the backward pass, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model["layer"](x)  # type: ignore[index, operator]
    return sum(sizes.values())


@pytest.mark.parametrize("corrected", [True, False])
def test_what_is_kept_is_the_ranks_share_of_loras(corrected: bool) -> None:
    x = torch.randn(3, 7, 64, requires_grad=True)
    frozen = layer_of(LoRAFA(rank=4, targets=["layer"], corrected=corrected))
    plain = layer_of(LoRA(rank=4, targets=["layer"]))
    assert kept(frozen, x) == 3 * 7 * 4
    assert kept(plain, x) == 3 * 7 * (4 + 64)


def test_a_stays_and_what_is_learned_lies_in_its_rows() -> None:
    model = settled("bert")
    inlay.attach(model, LoRAFA(rank=4), seed=0)
    before = {site: d.down.clone() for site, d in deltas_of(model).items()}  # type: ignore[union-attr, operator]
    weights = {site: model.get_submodule(site).weight.detach().clone() for site in before}  # type: ignore[union-attr, operator]
    fit(model, batch_for(model, rows=4, labels=True), steps=20)
    deltas = deltas_of(model)
    assert all(torch.equal(deltas[site].down, down) for site, down in before.items())  # type: ignore[arg-type]
    inlay.merge(model, undo=False)
    for site, down in before.items():
        change = (model.get_submodule(site).weight.detach() - weights[site]).double()  # type: ignore[operator]
        outside = torch.eye(32) - torch.linalg.pinv(down.double()) @ down.double()
        assert float((change @ outside).norm() / change.norm()) < 1e-5


@pytest.mark.parametrize("scaling", ["standard", "rsqrt"])
def test_the_corrected_gradient(scaling: str) -> None:
    settings: Any = {"rank": 4, "alpha": 6, "scaling": scaling, "targets": ["layer"]}
    s = 6 / 4 if scaling == "standard" else 3
    first = layer_of(LoRAFA(**settings, corrected=False)).double()
    model = layer_of(LoRAFA(**settings)).double()
    for each in (first, model):
        for _ in range(2):  # it accumulates
            each["layer"](torch.ones(5, 64, dtype=torch.float64)).sin().sum().backward()
    (old,), (new,) = deltas_of(first).values(), deltas_of(model).values()
    down: Any = new.down
    gram = down @ down.T + 1e-8 * torch.eye(4)
    assert distance(new.up.grad, old.up.grad @ torch.linalg.pinv(gram) / s**2) < 1e-10  # type: ignore[arg-type, operator, union-attr]
    assert distance(s**2 * new.up.grad @ gram, old.up.grad) < 1e-10  # type: ignore[arg-type, operator, union-attr]


def test_the_induced_change_is_the_full_gradient_projected_on_the_rows_of_a() -> None:
    model = layer_of(LoRAFA(rank=4, alpha=6, targets=["layer"])).double()
    layer: Any = model["layer"]  # type: ignore[index]
    (delta,) = deltas_of(model).values()
    down: Any = delta.down
    x = torch.randn(5, 64, dtype=torch.float64)
    layer(x).sin().sum().backward()
    weight = (layer.weight + 1.5 * delta.up.detach() @ down).requires_grad_()  # type: ignore[operator, union-attr]
    torch.nn.functional.linear(x, weight, layer.bias).sin().sum().backward()
    expected = weight.grad @ torch.linalg.pinv(down) @ down
    assert distance(1.5 * delta.up.grad @ down, expected) < 1e-7  # type: ignore[arg-type, operator, union-attr]


def test_orthonormal_rows_need_no_correction() -> None:
    """With s = 1 the gradient is the plain one, and its backward is linear: gradcheck of the plain part."""
    down = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64)).Q.T
    up = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 3, dtype=torch.float64)
    Corrected.apply(up, down, 1.0).backward(g)
    assert distance(up.grad, g) < 1e-7  # type: ignore[arg-type]
    down = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64)).Q.T / (1 + 1e-8) ** 0.5
    assert torch.autograd.gradcheck(lambda u: Corrected.apply(u, down, 1.0).sin(), up, atol=1e-6)


def test_under_autocast_the_correction_is_computed_in_float32() -> None:
    """peft computes it in bfloat16 wherever the machine can."""
    model, exact = (layer_of(LoRAFA(rank=8, targets=["layer"])) for _ in range(2))
    g = torch.randn(24, 8)
    for each, on in ((model, True), (exact, False)):
        (delta,) = deltas_of(each).values()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            Corrected.apply(delta.up, delta.down, 1.0).backward(g)
    (one,), (two,) = deltas_of(model).values(), deltas_of(exact).values()
    assert torch.equal(one.up.grad, two.up.grad)  # type: ignore[arg-type]


def test_a_comes_from_the_key_and_is_in_no_file(tmp_path: Path) -> None:
    model = settled("bert")
    inlay.attach(model, LoRAFA(key=5), name="fr", seed=3)
    shake(model)
    inlay.save(model, tmp_path / "fr")
    sizes = {site: d.up.numel() for site, d in deltas_of(model, "fr").items()}  # type: ignore[union-attr]
    (file,) = (tmp_path / "fr").glob("*.safetensors")
    assert file.stat().st_size < 4 * sum(sizes.values()) + 2000
    other = settled("bert")
    inlay.load(other, tmp_path / "fr", name="fr")
    batch = batch_for(model)
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    inlay.attach(other, LoRAFA(key=5), name="de", seed=8)
    inlay.attach(other, LoRAFA(key=6), name="es", seed=8)
    for site, delta in deltas_of(other, "fr").items():
        assert torch.equal(delta.down, deltas_of(other, "de")[site].down)  # type: ignore[arg-type]
        assert not torch.equal(delta.down, deltas_of(other, "es")[site].down)  # type: ignore[arg-type]


def test_an_a_found_from_data_is_saved(tmp_path: Path) -> None:
    model = settled("bert")
    inlay.attach(model, LoRAFA(rank=2, start=EVA()), data=[batch_for(model)], seed=0)
    shake(model)
    inlay.save(model, tmp_path / "eva")
    other = settled("bert")
    inlay.load(other, tmp_path / "eva")
    batch = batch_for(model)
    assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_count() -> None:
    model = settled("bert")
    assert inlay.plan(model, LoRAFA(rank=4, targets=("up",), layers=(0,))).parameters == 4 * 48


def test_from_a_kept_start_it_moves_b_alone() -> None:
    """ΔW = s·(B − B₀) A₀: zero at first, and A₀ stays."""
    model = settled("bert")
    batch = batch_for(model, labels=True)
    before = model(**batch).logits.detach()
    inlay.attach(model, LoRAFA(rank=4, start=PiSSA(), corrected=False, dropout=0.3), seed=0)
    assert torch.equal(model(**batch).logits, before)
    shake(model)
    adapted = model(**batch).logits.detach()
    for delta in deltas_of(model).values():
        change = delta.scale * (delta.up - delta.up_start) @ delta.down
        torch.testing.assert_close(delta.product(change), change)
    inlay.merge(model)
    assert distance(model(**batch).logits, adapted) < 1e-5
