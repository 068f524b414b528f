"""The kit's tools: snapshots see every change, effects are measured, stacks drawn make sense."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import inlay.testing
from inlay.authoring import At, Init, Method, OutputDelta, Site
from inlay.testing import Case, Joined, Member, differences, snapshot
from inlay.testing import neighbours as kit
from inlay.testing.cases import cases, tiny, visible
from inlay.testing.effects import LEAST, MOST, effect_of_merging, output, output_of, share, stir
from inlay.testing.profiles import profile
from inlay.testing.snapshots import same_bits

CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "a bit": (lambda m: m.lm_head.weight.data[0, 0].mul_(1.0000002), "lm_head: tensor weight"),
    "minus zero": (lambda m: m.model.zero.neg_(), "model: tensor zero"),
    "a flag": (lambda m: m.lm_head.weight.requires_grad_(False), "lm_head: tensor weight"),
    "an equal copy": (
        lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.data.clone())),
        "lm_head: tensor weight",
    ),
    "a gradient": (lambda m: m(input_ids=torch.ones(1, 2).long()).logits.sum().backward(), "tensor weight"),
    "a hook": (lambda m: m.lm_head.register_forward_hook(print), "lm_head: content of _forward_hooks"),
    "a pre-hook": (lambda m: m.register_forward_pre_hook(print), r"\(root\): content of _forward_pre_hooks"),
    "an attribute": (
        lambda m: setattr(m.model, "extra", 1),
        r"model: attributes: gone \[\], new \['extra'\]",
    ),
    "a mode": (lambda m: m.lm_head.train(), "lm_head: attribute training"),
    "a forward": (lambda m: setattr(m.lm_head, "forward", print), "lm_head: attributes: .*'forward'"),
    "a class": (
        lambda m: setattr(m.lm_head, "__class__", type("L", (nn.Linear,), {})),
        "class Linear became",
    ),
    "a setting": (lambda m: setattr(m.config, "use_cache", False), r"\(root\): content of config"),
    "a child": (lambda m: m.lm_head.add_module("more", nn.Identity()), "lm_head.more: new module"),
    "a module": (lambda m: setattr(m.model, "norm", nn.Identity()), "another module object|gone"),
    "an order": (lambda m: m._modules.update(model=m._modules.pop("model")), "other order"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_snapshot_sees(what: str) -> None:
    model = tiny("llama")
    model.model.register_buffer("zero", torch.zeros(2))
    before = snapshot(model)
    assert differences(before, model) == []
    change, says = CHANGES[what]
    change(model)
    found = "; ".join(differences(before, model))
    assert re.search(says, found), found


def test_a_snapshot_may_leave_values_out() -> None:
    model = tiny("llama")
    before = snapshot(model)
    model.lm_head.weight.data.mul_(2)
    assert differences(before, model, values=False) == []
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data)
    assert differences(before, model, values=False) == ["lm_head: tensor weight"]


def test_same_bits_tells_zeros_and_types_apart() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert not same_bits(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))


def case_of(*joined: Joined, family: str = "llama") -> Case:
    stack = tuple(Member(f"m{i}", j.kind(), j) for i, j in enumerate(joined))
    return Case(family, torch.float32, stack)


def test_stirring_gives_each_part_an_effect() -> None:
    """Each part alone, and what merges together, moves the output by 5 % to 100 %."""
    case = case_of(kit.LOW_RANK, kit.BEND, kit.GAIN)
    model = case.attached()
    assert share(output(model), output_of(model)) == 0.0
    stir(model, case, merging=True)
    for member in case.members:
        assert LEAST <= share(output_of(model, f"fr/{member.name}"), output_of(model)) <= MOST
    assert LEAST <= effect_of_merging(model, case) <= MOST


class Inert(OutputDelta):
    """A delta that never does anything."""

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.gain = init.zeros(site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        return 0 * self.gain


@dataclass(frozen=True)
class Idle(Method):
    """A method that never does anything."""

    id: ClassVar[str] = "idle"

    def delta(self, site: Site, init: Init) -> Inert:
        return Inert(site, init)


def test_an_adapter_without_effect_is_found_out() -> None:
    case = case_of(Joined(Idle, st.builds(Idle)))
    with pytest.raises(AssertionError, match=r"fr/m0 changes the output by 0.0e\+00 .* do its deltas run\?"):
        stir(case.attached(), case)


@profile()
@given(case=cases(kit.OWN, others=(kit.HEAD, kit.OWN, kit.LOW_RANK)))
def test_no_member_of_a_drawn_stack_is_hidden(case: Case) -> None:
    """Values put in the base's place hide what acts below them; such stacks are not drawn."""
    assert "subject" in [m.name for m in case.members]
    assert visible(case.family, case.members) == case.members


def test_the_package_names_what_it_has() -> None:
    assert all(getattr(inlay.testing, name) is not None for name in inlay.testing.__all__)
    with pytest.raises(AttributeError, match=r"'inlay\.testing' has no attribute 'nothing'"):
        inlay.testing.nothing  # noqa: B018
