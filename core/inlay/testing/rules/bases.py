"""R35 to R37: bases of other kinds: without weights yet, in few bits, and no transformer at all."""

from __future__ import annotations

import dataclasses
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError, InlayError
from inlay.testing.cases import NAME, Case, lively_settings
from inlay.testing.effects import (
    backward,
    close,
    output,
    same_output,
    share,
    stir,
    tensors_of,
    without_gradient,
)
from inlay.testing.models import FAMILIES
from inlay.testing.quantised import KINDS, PACKED_SIZES, kinds, packed, packed_tensors
from inlay.testing.rule import need, rule
from inlay.testing.rules.files import trained
from inlay.testing.snapshots import differences, digest, snapshot


def without_weights(case: Case) -> nn.Module:
    """Return the case's model on the meta device."""
    with torch.device("meta"):
        return FAMILIES[case.family](**lively_settings(case.family)).to(case.dtype).eval()


def give_weights(model: nn.Module, source: nn.Module) -> None:
    """Give a model on the meta device the tensors of another, buffers that are not saved too."""
    model.load_state_dict(source.state_dict(), strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    for name, buffer in source.named_buffers():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, buffer)


@rule(
    "R35",
    "It loads before the base has weights",
    means="a checkpoint loaded onto a model on the meta device, which then gets its weights, gives the "
    "very same bits as the model it was saved from.",
    usually="inject reads values of the base when it builds; or a tensor that is not saved is made "
    "from them.",
    share=0.34,
    alone=True,
)
def loads_without_weights(case: Case) -> None:
    model, empty = trained(case), without_weights(case)
    with tempfile.TemporaryDirectory() as folder:
        inlay.save(model, folder)
        inlay.load(empty, folder, NAME)
    give_weights(empty, case.model())
    own = {k: t for k, t in tensors_of(empty).items() if t.is_meta}
    need(not own, f"{sorted(own)[:1]} has no values ({len(own)} in all)")
    same_output(output(model), output(empty), "loading before the base's weights")


@rule(
    "R36",
    "It works on a quantised base",
    means="on a base in few bits (one kind of bitsandbytes' 4 and 8 bits and torchao's int8 and int4 in "
    "each example) the method acts, starts as it should, gets finite gradients, and leaves the packed "
    "weights alone; where it merges, storing costs what the kind costs, and unmerging gives the bits back; "
    "or, where it declares so, it is refused when it is attached.",
    usually="a delta reads `site.module.weight`, which holds packed bytes, instead of `at.weight`; or "
    "its tensors get the packed weight's dtype.",
    dtypes=("float32",),
    share=0.34,
    families=("llama",),
    alone=True,
)
def works_in_few_bits(case: Case) -> None:
    known = kinds() or (pytest.importorskip("bitsandbytes") and "nf4",)
    kind = known[case.seed % len(known)]
    # A forward without gradients rearranges 4-bit weights, so that nothing can train through them any more.
    plain = output(packed("llama", kind, seed=case.seed, **PACKED_SIZES))
    model = packed("llama", kind, seed=case.seed, **PACKED_SIZES)
    before, base = snapshot(model), digest(packed_tensors(model))
    joined = case.members[0].joined
    if not joined.quantised:
        try:
            case.attach(model)
        except InlayError:
            need(not (found := differences(before, model)), f"refused, it changed the model: {found[:3]}")
            return
        raise AssertionError("it declares quantised = False, and is attached without a word")
    case.attach(model)
    if case.members[0].method.starts_as_identity:
        started = output(model)
        need(
            close(started, plain, max(1e-5, joined.start_tolerance)),
            f"in {kind} it does not start as the base",
        )
    stir(model, case)
    backward(model)
    wrong = without_gradient(model)
    need(not wrong, f"in {kind} the gradient of {wrong[:1]} is missing or not finite")
    need(digest(packed_tensors(model)) == base, f"the packed weights changed ({kind})")
    if case.merging():
        _merges_into_few_bits(model, case, kind)


def _merges_into_few_bits(model: nn.Module, case: Case, kind: str) -> None:
    """A plain layer holds the merged weight; few bits cost what their kind does; unmerging gives all back."""
    adapted, base = output(model), digest(packed_tensors(model))
    for how in ("dequantise", "requantise"):
        report = inlay.merge(model, case.merging(), quantised=how)
        lost = max((site.noise for site in report.sites), default=0.0)
        need(lost <= (KINDS[kind].noise if how == "requantise" else 1e-6), f"{how}d, {kind} lost {lost:.1e}")
        inlay.unmerge(model)
        same_output(adapted, output(model), f"unmerging ({how}, {kind})")
        need(digest(packed_tensors(model)) == base, f"unmerging left other bits ({how}, {kind})")


class Plain(nn.Module):
    """Three linear layers whose sizes have many divisors; with labels it gives a loss beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.third(self.second(self.first(x).tanh()).tanh())
        if labels is None:
            return logits
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def _learn(model: nn.Module, x: Tensor) -> None:
    """Take three steps long enough to have an effect."""
    optimizer = torch.optim.Adam(inlay.parameter_groups(model))
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    inlay.lifecycle(model, optimizer, 3)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x).square().mean() + inlay.auxiliary_loss(model)).backward()
        optimizer.step()


@rule(
    "R37",
    "It works on any module",
    means="on a plain torch module, its layers chosen by name, the method attaches, learns, saves, "
    "loads, merges if it can, and detaches without a trace.",
    usually="inject asks the model for a config, a role or a layer's number, which only transformers have.",
    dtypes=("float32",),
    share=0.34,
    accepts="linear",
    alone=True,
)
def works_on_any_module(case: Case) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model, x = Plain().eval(), torch.randn(6, 16)
    try:
        method = dataclasses.replace(case.members[0].method, targets=("first", "third"), layers=None)
    except ConfigError:  # a configuration whose other settings choose the places
        return
    before, plain = snapshot(model), model(x)
    data = [{"x": x, "labels": torch.arange(6) % 5}] if method.calibrates else None
    inlay.attach(model, method, NAME, seed=case.seed, data=data)
    _learn(model, x)
    adapted = model(x).detach()
    need(share(adapted, plain.detach()) > 0, "it changes nothing after three steps")
    with tempfile.TemporaryDirectory() as folder:
        inlay.save(model, folder)
        inlay.load(model, folder, "again")
    with inlay.use(model, "again"):
        same_output(adapted, model(x).detach(), "loading")
    inlay.detach(model, "again")
    if all(part.mergeable for part in inlay.summary(model).parts):
        inlay.merge(model)
        merged = model(x).detach()
        need(close(merged, adapted, 1e-5), f"merged it is {share(merged, adapted):.1e} off")
        inlay.unmerge(model)
    inlay.detach(model)
    need(not (found := differences(before, model)), f"detached, the module is not what it was: {found[:3]}")
