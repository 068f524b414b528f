"""(IA)^3 beside huggingface/peft: same vectors in, same logits, gradients and merged weights out.

peft's own default targets are not the paper's on GPT-2, BERT and others (it scales queries too, or what
`attention.output.dense` reads), so the modules are named: keys, values, and what the feed-forward's last
layer reads. T5 scales `wo`'s input. On GPT-2 peft scales all of `c_attn`: its entries for queries are 1.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.testing.layers import deltas_of

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from layer_methods import FAMILIES, acts, batch_of, logits, ours, own, same, theirs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
TARGETS = {  # keys and values; what is scaled at its input
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
    "bert": (["key", "value"], ["layer.0.output.dense", "layer.1.output.dense"]),
    "t5": (["k", "v"], ["wo"]),
    "vit": (["k_proj", "v_proj"], ["fc2"]),
}


def pair(family: str) -> tuple[nn.Module, nn.Module]:
    """Return the model of both libraries, this one with its own default targets."""
    out, into = TARGETS[family]
    config = peft.IA3Config(target_modules=out + into, feedforward_modules=into)
    other, tensors = theirs(family, config), {}
    for name, tensor in own(other).items():
        path, vector = name.removesuffix(".ia3_l"), tensor.detach().flatten()
        if path.endswith("c_attn"):
            with torch.no_grad():
                vector[:32] = 1  # queries; a view of peft's own tensor
            tensors |= {f"{path}[{r}].scale": vector[i : i + 32] - 1 for r, i in (("key", 32), ("value", 64))}
        else:
            tensors[f"{path}.scale"] = vector - 1
    return other, ours(family, "ia3()", tensors)


@EVERY_FAMILY
def test_the_same_vectors_give_the_same_logits(family: str) -> None:
    other, model = pair(family)
    batch = batch_of(family)
    assert acts(family, model)
    assert same(logits(model, batch), logits(other, batch))


@EVERY_FAMILY
def test_the_same_vectors_get_the_same_gradients(family: str) -> None:
    other, model = pair(family)
    batch = {k: t.double() if t.is_floating_point() else t for k, t in batch_of(family).items()}
    for each in (other.double(), model.double()):
        each(**batch).loss.backward()
    expected: dict[str, Tensor] = {}
    for name, parameter in own(other).items():
        assert parameter.grad is not None
        expected[name.removesuffix(".ia3_l")] = parameter.grad.flatten()
    for site, delta in deltas_of(model).items():
        path, _, role = site.removesuffix("]").partition("[")
        rows = {"": slice(None), "key": slice(32, 64), "value": slice(64, 96)}[role]
        assert same(delta.scale.grad, expected[path][rows]), site  # type: ignore[union-attr, arg-type, operator]


@EVERY_FAMILY
def test_merged_weights_are_the_same(family: str) -> None:
    other, model = pair(family)
    inlay.merge(model, undo=False)
    merged: nn.Module = other.merge_and_unload()
    assert model.state_dict().keys() == merged.state_dict().keys()
    for name, tensor in merged.state_dict().items():
        assert same(model.state_dict()[name].float(), tensor.float()), name
