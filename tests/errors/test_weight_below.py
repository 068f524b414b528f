"""Members that need the weight below them (DoRA), above members that have none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import inlay
from inlay.authoring import Init, InputDelta, Method, OutputDelta, Site, setting
from inlay.errors import AttachError
from inlay.testing.models import build
from inlay.testing.refusal import refused
from inlay_lora import DoRA, LoRA
from inlay_scaling import IA3


class Curved(OutputDelta):
    """Δy = tanh(x A): on a linear layer, without a weight form."""

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.map = init.normal(site.in_features, site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return torch.tanh(x @ self.map)


class CurvedInput(InputDelta):
    """Δx = tanh(x): on the input of a linear layer, without a weight form."""

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.scale = init.ones(site.in_features)

    def forward(self, x: Tensor, at: Any) -> Tensor:
        return torch.tanh(x) * self.scale


@dataclass(frozen=True)
class Bend(Method):
    id: ClassVar[str] = "bend"
    input: bool = setting(False)

    def delta(self, site: Site, init: Init) -> Any:
        return CurvedInput(site, init) if self.input else Curved(site, init)


@pytest.mark.parametrize(
    "below", [Bend(targets=["query"]), Bend(input=True, targets=["query"])], ids=["output", "input"]
)
def test_dora_above_a_member_without_weight_form_is_refused(below: Method) -> None:
    model = build("llama")
    match = r"'fr/dora' needs the weight below it, and 'fr/bend' has none there[\s\S]*above Curved"
    with refused(AttachError, match, model=model) as caught:
        inlay.attach(model, below + DoRA(), "fr")
    assert "stack 'bend' after 'dora', or give them different targets" in caught.error.do
    inlay.attach(model, below, "de")
    with refused(
        AttachError, r"'fr/dora' needs the weight below it, and 'de/bend' has none there", model=model
    ):
        inlay.attach(model, DoRA(), "fr")
    inlay.attach(model, DoRA(targets=["value"]), "it")  # elsewhere it may stand
    inlay.attach(model, DoRA(), "es", activate=False)  # and here, as long as both are not used together
    with refused(AttachError, "'es/dora' needs the weight below it", model=model):
        inlay.use(model, "de", "es")
    with refused(AttachError, "'es/dora' needs the weight below it", model=model):
        inlay.route(model, [("de", "es"), None])


@pytest.mark.parametrize(
    "stack",
    [
        DoRA(targets=["query"]) + Bend(targets=["query"]),
        IA3(targets=["value"]) + DoRA(),
        LoRA() + DoRA(),
        DoRA() + DoRA().named("second"),
    ],
    ids=str,
)
def test_dora_stands_where_everything_below_has_a_weight_form(stack: Any) -> None:
    inlay.attach(build("llama"), stack)


def test_dora_above_a_part_of_a_fused_projection_that_overlaps_is_refused() -> None:
    model = build("gpt2")
    match = r"'fr/dora' needs the weight below it, which 'fr/lora' changes as part of another"
    with refused(AttachError, match, model=model):
        inlay.attach(model, LoRA(targets=["c_attn"]) + DoRA(targets=["query"]), "fr")
    inlay.attach(model, LoRA(targets=["value"]) + DoRA(targets=["query"]), "fr")
