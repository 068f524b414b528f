"""`at.bias`: the bias below a member, without its weight where nothing lies below."""

from __future__ import annotations

import torch
from torch import nn

from inlay.sites import ModuleSite
from inlay.testing.models import build
from inlay.weights import Level
from inlay_scaling.ssf import ScaleShift


def site_of(model: nn.Module, path: str) -> ModuleSite:
    return ModuleSite(name=path, module=model.get_submodule(path), layer_kind="linear")


def test_the_bias_alone_does_not_ask_for_the_weight() -> None:
    site = site_of(build("bert"), "bert.encoder.layer.0.attention.self.query")
    level = Level(site, [])
    del site.module.weight
    assert level.bias is not None
    assert torch.equal(level.bias, site.module.bias)  # type: ignore[arg-type]


def test_what_lies_below_has_changed_it() -> None:
    from inlay.adapter import Init

    site = site_of(build("bert"), "bert.encoder.layer.0.attention.self.query")
    below = ScaleShift(site, Init("0", site.reference), std=0.5)
    level = Level(site, [below])
    plain = Level(site, []).bias
    assert plain is not None
    assert level.bias is not None
    torch.testing.assert_close(level.bias, (1 + below.scale) * plain + below.shift)


def test_a_layer_without_one() -> None:
    assert Level(site_of(build("llama"), "model.layers.0.self_attn.q_proj"), []).bias is None
