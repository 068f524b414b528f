"""Each rule catches the mistake it is about: a method broken in one way breaks it, the sound one does not."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from inlay.authoring import Adapter, At, Init, Method, Site, hookimpl, register, setting
from inlay.testing import RULES, Case, Joined, Member, Rule
from inlay.testing import neighbours as kit

COUNTER = itertools.count()


class Broken(kit.LowRank):
    """A low-rank change with one mistake, named by `how`."""

    scratch: ClassVar[dict[str, nn.Parameter]] = {}

    def __init__(self, site: Site, init: Init, how: str) -> None:
        super().__init__(site, init, 2)
        self.how, self.module = how, None
        getattr(self, f"make_{how}", lambda *_: None)(site, init)

    def make_starts_elsewhere(self, site: Site, init: Init) -> None:
        self.B = init.ones(site.out_features, 2)

    def make_draws_globally(self, site: Site, init: Init) -> None:
        self.A = nn.Parameter(torch.randn(2, site.in_features).to(init.dtype))

    def make_unused(self, site: Site, init: Init) -> None:
        self.C = init.ones(3)

    def make_unsaved(self, site: Site, init: Init) -> None:
        self.factor = 1.0 + next(COUNTER)

    def make_hashed(self, site: Site, init: Init) -> None:
        self.factor = 1.0 + hash(site.name) % 1000

    def make_unpicklable(self, site: Site, init: Init) -> None:
        self.function = lambda x: x

    def make_tied(self, site: Site, init: Init) -> None:
        self.tied = site.module.weight

    def make_on_the_class(self, site: Site, init: Init) -> None:
        self.B = self.scratch.setdefault(site.name, self.B)

    def make_writes_base(self, site: Site, init: Init) -> None:
        self.write = lambda: site.module.weight.data.mul_(1.001)

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        change = super().forward(x, y, at) * getattr(self, "factor", 1.0)
        if self.how == "writes_base" and self.training:
            self.write()
        if self.how == "warns":
            warnings.warn("a shape broadcasts", stacklevel=1)
        if self.how == "mixes_rows" and self.A.requires_grad:
            change = change + change.mean(0, keepdim=True) - change.mean(0, keepdim=True).detach() * 0.5
        return change

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        folded, bias = super().fold(weight, bias)
        if self.how == "folds_nearly":
            return weight + (folded - weight) * (1 + 4e-4), bias
        if self.how == "folds_coarsely":
            step = 2 ** (folded.abs().log2().floor() - 5)  # six bits; bfloat16 has eight
            return (folded / step).round() * step, bias
        if self.how == "folds_and_changes":
            self.A.data.neg_(), self.B.data.neg_()
        if self.how == "adds_bias":
            return folded, folded.new_zeros(folded.shape[0]) if bias is None else bias
        return folded, bias


@register
@dataclass(frozen=True)
class Mistaken(Method):
    """A method with one mistake."""

    id: ClassVar[str] = "mistaken"
    how: str = setting("not at all")

    def delta(self, site: Site, init: Init) -> Broken:
        return Broken(site, init, self.how)

    @staticmethod
    @hookimpl
    def inject(method: Mistaken, sites: Sequence[Site], adapter: Adapter) -> int:  # type: ignore[override]
        if method.how == "hooks" and not adapter.meta:
            sites[0].module.register_forward_hook(lambda module, args, output: output * 1.5)
        if method.how == "touches" and not adapter.meta:
            sites[-1].module.weight.data.neg_()
        return Method.inject(method, sites, adapter)


@register
@dataclass(frozen=True)
class Unchecked(Mistaken):
    """A method that does not check its settings."""

    id: ClassVar[str] = "unchecked"

    def __post_init__(self) -> None:
        object.__setattr__(self, "note", self.how)


@register
@dataclass(frozen=True)
class Opaque(Mistaken):
    """A method with a setting that is no data."""

    id: ClassVar[str] = "opaque"
    function: Any = setting(abs)


class Heavy(Mistaken):
    """A method whose module imports transformers."""

    __module__ = "transformers"


def fewer(method: Method, sites: Sequence[Site]) -> int:
    """A documented count that forgets a tensor."""
    return sum(2 * (s.in_features + s.out_features) for s in sites)


# rule: the mistake, the method that makes it, what it declares, what the rule says
MISTAKES: dict[str, tuple[str, type[Method], dict[str, Any], str]] = {
    "R01": ("starts_elsewhere", Mistaken, {}, "attaching: the output differs"),
    "R02": ("hooks", Mistaken, {}, "q_proj: content of _forward_hooks"),
    "R03": ("touches", Mistaken, {}, "after a failure at inject .*v_proj: tensor weight"),
    "R04": ("hooks", Mistaken, {}, r"use\(model\): the output differs"),
    "R05": ("draws_globally", Mistaken, {}, "drew from torch's generator"),
    "R06": ("writes_base", Mistaken, {}, "AdamW changed the base"),
    "R07": ("unused", Mistaken, {}, r"flag or gradient of .*q_proj\.C"),
    "R08": ("unused", Mistaken, {"parameters": fewer}, "has 460 parameters; its expression gives 448"),
    "R09": ("folds_nearly", Mistaken, {}, "error .*, effect"),
    "R10": ("folds_coarsely", Mistaken, {}, "does not do what the adapted one does"),
    "R11": ("folds_and_changes", Mistaken, {}, "after merge and unmerge .*tensor A"),
    "R12": ("adds_bias", Mistaken, {}, "the merged model is not plain: .*tensor bias"),
    "R14": ("not at all", Mistaken, {"merges": False}, "merging raised nothing"),
    "R15": ("unsaved", Mistaken, {}, "loading: the output differs"),
    "R16": ("hashed", Mistaken, {}, "the other process computed other bits"),
    "R17": ("unpicklable", Mistaken, {}, "pickle local object"),
    "R18": ("tied", Mistaken, {}, r"loading a base changed .*q_proj\.tied"),
    "R19": ("unsaved", Mistaken, {}, "from_pretrained and load: the output differs"),
    "R20": ("mixes_rows", Mistaken, {}, r"row 1 \(fr\) is .* off the sample alone"),
    "R21": ("on_the_class", Mistaken, {}, "training 'de' changed .*q_proj.B|attaching, training and"),
    "R22": ("not at all", Opaque, {}, "is not JSON serializable"),
    "R23": ("not at all", Unchecked, {}, r"Unchecked\(targets=.*raised nothing"),
    "R24": ("warns", Mistaken, {}, "UserWarning: a shape broadcasts"),
    "R25": ("not at all", Heavy, {}, "importing transformers imports transformers"),
    "R26": ("not at all", Mistaken, {}, "is no arXiv id"),
}
CORE_ALONE = {"R13"}  # no method can break it: only operations of core can forget to refuse


def case_of(kind: type[Method], how: str, dtype: str, **declared: Any) -> Case:
    joined = Joined(kind, st.builds(kind), **{"merges": True, **declared})
    return Case("llama", getattr(torch, dtype), (Member("subject", kind(how=how), joined),), seed=1)


def quietly(rule: Rule, subject: Case | Joined) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rule(subject)


@pytest.mark.parametrize("number", MISTAKES)
def test_the_rule_catches(number: str) -> None:
    """A method with the mistake breaks the rule, and the message says which and why."""
    how, kind, declared, says = MISTAKES[number]
    rule = RULES[number]
    Broken.scratch.clear()
    case = case_of(kind, how, rule.dtypes[0], **declared)
    with pytest.raises(Exception, match=says) as caught:
        quietly(rule, case.members[0].joined if rule.once else case)
    assert f"rule {number}: {rule.title}" in "".join(caught.value.__notes__)
    assert rule.usually in "".join(caught.value.__notes__)


@pytest.mark.parametrize("number", [n for n, rule in RULES.items() if not rule.once and n != "R14"])
def test_the_sound_method_passes(number: str) -> None:
    """The same method without a mistake keeps the rule, so that it was the mistake that broke it."""
    RULES[number](case_of(Mistaken, "not at all", RULES[number].dtypes[0]))


def test_every_rule_is_shown_to_catch() -> None:
    assert MISTAKES.keys() | CORE_ALONE == RULES.keys()
