"""LoRA and DoRA beside huggingface/peft: same weights in, same logits, gradients and merged weights out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.testing.layers import deltas_of, settled

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from layer_methods import FAMILIES, LINEAR, acts, batch_of, logits, ours, own, same, theirs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EMBEDDING = {"llama": "embed_tokens", "bert": "word_embeddings"}


def renamed(family: str, model: nn.Module) -> dict[str, Tensor]:
    """Return peft's tensors under the names they have here."""
    found: dict[str, Tensor] = {}
    for name, tensor in own(model).items():
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf == "bias":
            found[f"{path.removesuffix('.lora_B')}.bias"] = tensor
            continue
        if leaf.startswith("lora_embedding"):
            found[f"{path}.{'down' if leaf.endswith('A') else 'up'}"] = tensor
        elif leaf == "lora_magnitude_vector":
            plain: Any = settled(family).get_submodule(path).weight
            rows = plain.norm(dim=0 if type(settled(family).get_submodule(path)).__name__ == "Conv1D" else 1)
            found[f"{path}.magnitude"] = tensor - rows
        else:
            found[f"{path}.{'down' if leaf == 'lora_A' else 'up'}"] = tensor
    return found


def pair(family: str, targets: list[str], stack: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Return the model of both libraries; `stack` has {targets} in it."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, lora_dropout=0.0, **settings)
    other = theirs(family, config)
    return other, ours(family, stack.format(targets=targets), renamed(family, other))


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora(rank=4, alpha=6, targets={targets})", {}),
    "rank-stabilised": ("lora(rank=4, alpha=6, scaling='rsqrt', targets={targets})", {"use_rslora": True}),
    "dora": ("dora(rank=4, alpha=6, targets={targets})", {"use_dora": True}),
}
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS)


@EVERY_FAMILY
@EVERY_SETTING
def test_the_same_weights_give_the_same_logits(setting: str, family: str) -> None:
    stack, settings = SETTINGS[setting]
    other, model = pair(family, LINEAR[family], stack, **settings)
    batch = batch_of(family)
    assert acts(family, model)
    assert same(logits(model, batch), logits(other, batch))


@EVERY_FAMILY
@EVERY_SETTING
def test_the_same_weights_get_the_same_gradients(setting: str, family: str) -> None:
    """In float64: what rounding does to a forward, a backward through T5 makes ten times of."""
    stack, settings = SETTINGS[setting]
    other, model = pair(family, LINEAR[family], stack, **settings)
    batch = {k: t.double() if t.is_floating_point() else t for k, t in batch_of(family).items()}
    for each in (other.double(), model.double()):
        each(**batch).loss.backward()
    expected = {name.removesuffix(".weight"): p.grad for name, p in own(other).items() if p.grad is not None}
    names = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}
    seen = 0
    for site, delta in deltas_of(model).items():
        for name, parameter in delta.named_parameters():
            assert parameter.grad is not None
            assert same(parameter.grad, expected[f"{site}.{names[name]}"]), f"{site}.{name}"
            seen += 1
    assert seen == len(expected)


@EVERY_FAMILY
@EVERY_SETTING
def test_merged_weights_are_the_same(setting: str, family: str) -> None:
    stack, settings = SETTINGS[setting]
    other, model = pair(family, LINEAR[family], stack, **settings)
    inlay.merge(model, undo=False)
    merged: nn.Module = other.merge_and_unload()
    assert model.state_dict().keys() == merged.state_dict().keys()
    changed = 0
    plain = settled(family).state_dict()
    for name, tensor in merged.state_dict().items():
        assert same(model.state_dict()[name].float(), tensor.float()), name
        changed += not torch.equal(tensor, plain[name])
    assert changed == len(own_targets(family))


def own_targets(family: str) -> list[str]:
    names = [n for n, m in settled(family).named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    return [n for n in names if any(n == t or n.endswith(f".{t}") for t in LINEAR[family])]


@pytest.mark.parametrize("family", EMBEDDING)
def test_lora_on_an_embedding(family: str) -> None:
    other, model = pair(family, [EMBEDDING[family]], "lora(rank=4, alpha=6, targets={targets})")
    batch = batch_of(family)
    assert acts(family, model)
    assert same(logits(model, batch), logits(other, batch))


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit"])
def test_biases_of_b(family: str) -> None:
    """Times s, in the output and in the merged weight; peft's merge into few bits alone forgets s."""
    stack = "lora(rank=4, alpha=6, bias='own', targets={targets})"
    other, model = pair(family, LINEAR[family], stack, lora_bias=True)
    batch = batch_of(family)
    assert same(logits(model, batch), logits(other, batch))
    for each in (other, model):
        each(**batch).loss.backward()
    expected = {name: p.grad for name, p in own(other).items()}
    for site, delta in deltas_of(model).items():  # a key's bias has no gradient but rounding
        torch.testing.assert_close(delta.bias.grad, expected[f"{site}.lora_B.bias"], atol=1e-6, rtol=1e-4)
    inlay.merge(model, undo=False)
    for name, tensor in other.merge_and_unload().state_dict().items():
        assert same(model.state_dict()[name], tensor), name
