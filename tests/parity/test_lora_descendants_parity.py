"""LoRA+, LoRA-FA and QA-LoRA beside huggingface/peft, and where peft departs from their papers.

peft has the first two as makers of optimizers for its LoRA, the third for GPTQ layers alone, of which its
adapter reads nothing but what they give: here they are plain ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.testing.layers import deltas_of, settled
from inlay.testing.tools import distance

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from layer_methods import LINEAR, acts, batch_of, logits, own, same, theirs  # noqa: E402
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, lorafa  # noqa: E402
from peft.tuners.lora.gptq import GPTQLoraLinear  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
EVERY_FAMILY = pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])


def pair(family: str, method: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Return peft's LoRA and the same tensors in a method of this side, on every linear layer."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR[family], **settings)
    other, model = theirs(family, config), settled(family)
    scaling = "rsqrt" if settings.get("use_rslora") else "standard"
    inlay.attach(model, f"{method}(rank=4, alpha=6, scaling='{scaling}', targets={LINEAR[family]})")
    with torch.no_grad():
        for name, tensor in own(other).items():
            site, leaf = name.removesuffix(".weight").rsplit(".", 1)
            delta: Any = deltas_of(model)[site]
            getattr(delta, {"lora_A": "down", "lora_B": "up"}[leaf]).copy_(tensor)
    return other, model


@EVERY_FAMILY
def test_lora_plus_has_the_same_groups(family: str) -> None:
    other, model = pair(family, "lora_plus")
    made = create_loraplus_optimizer(other, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    names = {id(p): n.removesuffix(".weight") for n, p in own(other).items()}
    expected = {names[id(p)]: group["lr"] for group in made.param_groups for p in group["params"]}
    mine = {id(p): group["lr"] for group in inlay.parameter_groups(model, lr=1e-3) for p in group["params"]}
    found: dict[str, float] = {}
    for site, delta in deltas_of(model).items():
        found |= {f"{site}.lora_{n}": mine[id(getattr(delta, p))] for n, p in (("A", "down"), ("B", "up"))}
    assert found == expected
    assert set(found.values()) == {1e-3, 16e-3}


def test_lora_plus_gives_embeddings_the_rate_that_peft_does() -> None:
    config = peft.LoraConfig(r=4, target_modules=["word_embeddings", "query"])
    other, model = theirs("bert", config), settled("bert")
    inlay.attach(model, "lora_plus(targets=['word_embeddings', 'query'])")
    made = create_loraplus_optimizer(other, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    counts = {g["lr"]: len(g["params"]) for g in made.param_groups if g["params"]}
    assert counts == {g["lr"]: len(g["params"]) for g in inlay.parameter_groups(model, lr=1e-3)}
    assert counts == {1e-3: 2, 16e-3: 2, 1e-6: 2}


@EVERY_FAMILY
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_fa_takes_the_same_steps(family: str, rslora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With peft's autocast to bfloat16 off, and Adam as peft writes it, eps beside the uncorrected root."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    other, model = pair(family, "lora_fa", use_rslora=rslora)
    assert acts(family, model)
    assert same(logits(model, batch_of(family)), logits(other, batch_of(family)))
    batch = batch_of(family)
    optimizer = create_lorafa_optimizer(other, r=4, lora_alpha=6, lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        for each in (other, model):
            each.zero_grad()
            each(**batch).loss.backward()
        optimizer.step()
        for site, delta in deltas_of(model).items():
            adam(delta.up, optimizer.state[f"base_model.model.{site}.lora"]["exp_avg_B"])  # type: ignore[arg-type]
    for site, delta in deltas_of(model).items():
        expected = own(other)[f"{site}.lora_B.weight"]
        assert distance(delta.up, expected) < 1e-5, site  # type: ignore[arg-type]


@EVERY_FAMILY
def test_lora_fa_merges_alike(family: str) -> None:
    other, model = pair(family, "lora_fa")
    inlay.merge(model, undo=False)
    merged: nn.Module = other.merge_and_unload()  # type: ignore[operator]
    assert model.state_dict().keys() == merged.state_dict().keys()
    for name, tensor in merged.state_dict().items():
        assert same(model.state_dict()[name].float(), tensor.float()), name


def adam(parameter: nn.Parameter, other: Tensor) -> None:
    """Take peft's step, of 1e-3 with a decay of 0.1; its first moment is `other`."""
    state: Any = parameter.__dict__.setdefault(
        "moments", [0, torch.zeros_like(other), torch.zeros_like(other)]
    )
    assert parameter.grad is not None
    state[0] += 1
    with torch.no_grad():
        state[1].mul_(0.9).add_(parameter.grad, alpha=0.1)
        state[2].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
        assert distance(state[1], other) < 1e-4
        rate = 1e-3 * (1 - 0.999 ** state[0]) ** 0.5 / (1 - 0.9 ** state[0])
        parameter.addcdiv_(state[1], state[2].sqrt() + 1e-6, value=-rate)
        parameter.mul_(1 - 1e-3 * 0.1)


def test_peft_corrects_lora_fas_gradient_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine can, for float32 adapters too; this side agrees with the formula."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: True)
    other, model = pair("bert", "lora_fa")
    plain: dict[str, Tensor] = {}
    for each in (other, model):
        each(**batch_of("bert")).loss.backward()
    for name, parameter in own(other).items():
        if "lora_B" in name:
            assert parameter.grad is not None
            plain[name.removesuffix(".lora_B.weight")] = parameter.grad.clone()
    optimizer = create_lorafa_optimizer(other, r=4, lora_alpha=6, lr=1e-3)
    optimizer.step()
    errors = []
    for site, delta in deltas_of(model).items():
        down: Any = delta.down.double()  # type: ignore[union-attr, operator]
        formula = plain[site].double() @ torch.linalg.pinv(down @ down.T + 1e-8 * torch.eye(4)) / 1.5**2
        assert distance(delta.up.grad, formula) < 1e-5  # type: ignore[union-attr, arg-type]
        used = optimizer.state[f"base_model.model.{site}.lora"]["exp_avg_B"] / 0.1
        errors.append(distance(used, formula))
    assert min(errors) > 1e-4


def test_qa_lora_and_peft_differ_by_the_number_of_groups() -> None:
    """peft multiplies the means by in/g: with as many times the scale this side is the same."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 24), torch.randn(2, 5, 32)
    config = peft.LoraConfig(r=3, lora_alpha=6, use_qalora=True, qalora_group_size=8)
    other = GPTQLoraLinear(layer, "default", config, r=3, lora_alpha=6).eval()
    nn.init.normal_(other.lora_B["default"].weight)
    base, effect = layer(x), other(x) - layer(x)
    down, up = (m["default"].weight for m in (other.lora_A, other.lora_B))
    assert down.shape == (3, 4)
    for alpha, same_as_peft in ((6 * 4, True), (6, False)):
        model = nn.ModuleDict({"layer": nn.Linear(32, 24)})
        model.load_state_dict({"layer.weight": layer.weight, "layer.bias": layer.bias})
        inlay.attach(model, f"qa_lora(rank=3, alpha={alpha}, group=8, targets=['layer'])")
        delta: Any = next(iter(deltas_of(model).values()))
        with torch.no_grad():
            delta.down.copy_(down)
            delta.up.copy_(up)
        found = model["layer"](x) - base
        assert (distance(found, effect) < 1e-5) is same_as_peft
        wide = (up @ down).repeat_interleave(8, 1) * (alpha / 3 / 8)
        assert distance(found, F.linear(x, wide)) < 1e-5
