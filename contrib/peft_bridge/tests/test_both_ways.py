"""Each method from peft and to it: the same logits, on Llama, GPT-2 and BERT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from twins import TWINS, far, loaded_by_peft, logits, saved_by_peft

import inlay
from inlay.testing.layers import settled
from inlay.testing.tools import shake
from inlay_peft_bridge import from_peft, to_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    # peft takes the bias that lora_bias=True makes for a tensor that was cut off.
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape:UserWarning"),
]
CASES = [(family, name) for name, twin in TWINS.items() for family in twin.families]
EVERY = pytest.mark.parametrize(("family", "name"), CASES)


def attached(family: str, stack: str) -> nn.Module:
    model = settled(family)
    inlay.attach(model, stack, train=("head",) if family == "bert" else (), seed=0)
    shake(model)
    return model


@EVERY
def test_from_peft(family: str, name: str, tmp_path: Path) -> None:
    expected = saved_by_peft(family, TWINS[name], tmp_path)
    model = settled(family)
    before = logits(model)
    report = from_peft(tmp_path, model)
    assert report.sites > 0
    assert far(logits(model), before) > 0.02
    assert far(logits(model), expected) < 1e-5
    inlay.detach(model)
    assert torch.equal(logits(model), before)


@EVERY
def test_to_peft(family: str, name: str, tmp_path: Path) -> None:
    model = attached(family, TWINS[name].stack(family))
    before = logits(settled(family))
    report = to_peft(model, tmp_path / "out")
    other = loaded_by_peft(family, tmp_path / "out")
    assert report.tensors > 0
    assert far(logits(other), before) > 0.02
    assert far(logits(other), logits(model)) < 1e-5


@pytest.mark.parametrize(("family", "name"), [("bert", "rslora"), ("gpt2", "lora"), ("llama", "boft")])
def test_there_and_back_has_the_same_tensors(family: str, name: str, tmp_path: Path) -> None:
    saved_by_peft(family, TWINS[name], tmp_path / "one")
    model = settled(family)
    from_peft(tmp_path / "one", model)
    to_peft(model, tmp_path / "two")
    again = settled(family)
    from_peft(tmp_path / "two", again)
    ours, theirs = (inlay.stack.need_state(m).placed.values() for m in (model, again))
    for a, b in zip(ours, theirs, strict=True):
        for (key, x), (other, y) in zip(
            sorted(a.adapter.tensors().items()), sorted(b.adapter.tensors().items()), strict=True
        ):
            assert key == other
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "stack", ["lora(rank=3, alpha=5, start=pissa())", "lora(rank=2, start=olora(), scaling='rsqrt')"]
)
def test_a_start_that_is_kept_goes_along_in_double_rank(stack: str, tmp_path: Path) -> None:
    model = attached("bert", stack)
    to_peft(model, tmp_path / "out")
    assert far(logits(loaded_by_peft("bert", tmp_path / "out")), logits(model)) < 1e-5


def test_ranks_by_role_become_a_pattern(tmp_path: Path) -> None:
    model = attached("llama", "lora(rank={'query': 3, 'up': 2}, alpha=5, targets=['query', 'up'])")
    to_peft(model, tmp_path / "out")
    assert far(logits(loaded_by_peft("llama", tmp_path / "out")), logits(model)) < 1e-5
