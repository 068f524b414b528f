"""A forward put on an instance hides the class's, and with it every adapter: refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import AttachError, TrainingError
from inlay.testing.models import batch_for
from inlay.testing.snapshots import differences, snapshot
from inlay.testing.tools import distance, lively, shake

pytest.importorskip("transformers")

CLOSE = 1e-5
LORA, PREFIX, SERIAL = "lora(rank=2)", "prefix_tuning(length=2, hidden=16)", "serial_adapter(rank=4)"


def wrapped(module: nn.Module) -> None:
    """What profilers and tracers do: a closure around the forward that was there."""
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def partial(module: nn.Module) -> None:
    module.forward = functools.partial(type(module).forward, module)


PATCHES: dict[str, Callable[[nn.Module], None]] = {"wrapped": wrapped, "partial": partial}
EVERY_PATCH = pytest.mark.parametrize("patch", list(PATCHES.values()), ids=list(PATCHES))
PLACES = [
    (LORA, "model.layers.1.self_attn.q_proj"),
    (PREFIX, "model.layers.1.self_attn"),
    (SERIAL, "model.layers.0.self_attn"),
    (SERIAL, "model.layers.1.post_attention_layernorm"),
    (LORA, "model"),
    (LORA, ""),
]


def loss(model: nn.Module) -> Tensor:
    model.zero_grad()
    value: Tensor = model(**batch_for(model, labels=True)).loss
    value.backward()
    return value.detach()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch_for(model)).logits


@EVERY_PATCH
@pytest.mark.parametrize(("stack", "name"), PLACES)
def test_a_patch_from_before_is_refused_and_the_model_left_alone(
    stack: str, name: str, patch: Callable[[nn.Module], None]
) -> None:
    model = lively("llama")
    module = model.get_submodule(name)
    patch(module)
    before = snapshot(model)
    shown = (name or "LlamaForCausalLM").replace(".", r"\.")
    with pytest.raises(AttachError, match=rf"replaced on the instance(.|\n)*saw: {shown}\.forward is <?func"):
        inlay.attach(model, stack)
    assert differences(before, model) == []
    del module.forward
    inlay.attach(model, stack)
    loss(model)
    inlay.check_training(model)


@EVERY_PATCH
@pytest.mark.parametrize(("stack", "name"), PLACES)
def test_a_patch_from_after_is_noticed(stack: str, name: str, patch: Callable[[nn.Module], None]) -> None:
    """Whatever it does, the adapter cannot answer for it: training and a second attach say so."""
    model = lively("llama")
    inlay.attach(model, stack)
    module = model.get_submodule(name)
    patch(module)
    loss(model)
    shown = name.replace(".", r"\.")
    with pytest.raises(TrainingError, match=rf"forward was replaced after attaching(.|\n)*saw: {shown}: "):
        inlay.check_training(model)
    before = snapshot(model)
    with pytest.raises(AttachError, match=rf"would be bypassed(.|\n)*saw: {shown}: "):
        inlay.attach(model, LORA, name="second")
    assert differences(before, model) == []
    del module.forward
    loss(model)
    inlay.check_training(model)


def test_a_patched_block_or_untouched_layer_is_no_obstacle() -> None:
    """Blocks run their deltas in a hook around the call; modules without deltas are nobody's business."""
    plain, model = lively("llama"), lively("llama")
    wrapped(model.model.layers[0])
    wrapped(model.model.layers[1].mlp.up_proj)
    for adapted in (plain, model):
        inlay.attach(adapted, f"{LORA} + {PREFIX}", seed=1)
        shake(adapted)
    assert torch.equal(logits(model), logits(plain))
    assert distance(logits(model), logits(lively("llama"))) > 0.05
    inlay.detach(model)
    assert torch.equal(logits(model), logits(lively("llama")))


def test_forward_hooks_of_the_user_keep_running() -> None:
    """A hook sees the adapted output, and may change it; detaching leaves it in place."""
    model = lively("llama")
    query, seen = model.model.layers[0].self_attn.q_proj, []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return 2 * output

    query.register_forward_hook(hook)
    base = logits(model)
    inlay.attach(model, LORA)
    shake(model)
    adapted = logits(model)
    assert distance(seen[1], seen[0]) > 0.05
    assert distance(adapted, base) > 0.05
    inlay.detach(model)
    assert torch.equal(logits(model), base)
    assert len(seen) == 3
