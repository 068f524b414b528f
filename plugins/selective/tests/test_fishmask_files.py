"""FishMask: its files, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError
from inlay.stack import need_state
from inlay.testing import elsewhere
from inlay.testing.effects import output
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay.testing.snapshots import digest
from inlay.testing.tools import shake
from inlay_selective import FishMask

METHOD = FishMask(density=0.1)


def data_for(model: nn.Module) -> list[dict[str, Any]]:
    return [batch_for(model, rows=2, seed=seed, labels=True) for seed in range(3)]


def ready(family: str) -> nn.Module:
    """Return a model that has run once: a classifier then notes the kind of its labels in its config."""
    model = build(family)
    model(**batch_for(model, labels=True))
    return model


class Constant(nn.Module):
    """A model whose loss its layer has no part in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return type("Output", (), {"loss": x.sum()})()


def test_it_loads_in_another_process_without_data(tmp_path: Path) -> None:
    model = build("bert", initializer_range=0.2)
    inlay.attach(model, METHOD, data=data_for(model))
    shake(model)
    inlay.save(model, tmp_path)
    answer = elsewhere.ask(folder=str(tmp_path), family="bert", seed=0, dtype="float32", modules={})
    assert answer.get("digest") == digest({"logits": output(model)}), answer


def test_a_file_holds_a_value_and_a_place_for_each_entry(tmp_path: Path) -> None:
    model = build("llama")
    count = int(0.1 * sum(p.numel() for p in model.parameters()))
    inlay.attach(model, METHOD, data=data_for(model))
    inlay.save(model, tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == count * (4 + 4)


@pytest.mark.parametrize(("entry", "place"), [(-1, 32 * 64), (0, -1), (1, 0)])
def test_places_that_are_none_are_refused_when_loading(tmp_path: Path, entry: int, place: int) -> None:
    model, fresh = build("llama"), build("llama")
    inlay.attach(model, METHOD, data=data_for(model))
    need_state(model).placed[0].adapter.calibration["lm_head.weight"][entry] = place
    inlay.save(model, tmp_path)
    with refused(ConfigError, "the chosen entries are no places of the tensor", model=fresh, folder=tmp_path):
        inlay.load(fresh, tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"'fishmask' must see data before it is placed[\s\S]*data=batches"),
        (5, r"data is nothing that gives batches[\s\S]*saw: a int"),
        ([], "there is nothing to calibrate on"),
        (iter([]), r"there is nothing to calibrate on[\s\S]*used up before"),
        ({"input_ids": 1}, r"a batch to calibrate on is a mapping[\s\S]*batch 0 is a str"),
        ([{"input_ids": torch.ones(1, 2).long()}], r"a batch gives no loss[\s\S]*saw: no loss in the model"),
    ],
)
def test_what_data_must_be(data: Any, message: str) -> None:
    model = ready("bert")
    with refused(ConfigError, message, model=model):
        inlay.attach(model, METHOD, data=data)


def test_a_later_batch_that_is_none() -> None:
    model = ready("bert")
    with refused(ConfigError, "batch 3 is a list", model=model):
        inlay.attach(model, METHOD, data=[*data_for(model), [1, 2]])


def test_gradients_that_are_not_finite() -> None:
    model = ready("bert")
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = torch.nan
    with refused(ConfigError, "a score is not finite, so no entries can be chosen by it", model=model):
        inlay.attach(model, METHOD, data=data_for(model))


def test_a_loss_on_which_no_target_has_an_effect() -> None:
    model = Constant()
    with refused(ConfigError, "a loss that no target takes part in", model=model):
        inlay.attach(model, FishMask(density=0.5), data=[{"x": torch.ones(2, 3)}])


def test_a_density_that_leaves_nothing_to_choose() -> None:
    model = ready("roberta")  # its head has a layer of its own
    with refused(ConfigError, r"the density leaves no entry to choose[\s\S]*the head has 1,155", model=model):
        inlay.attach(model, FishMask(density=0.05), data=data_for(model))
    with refused(ConfigError, "the density leaves no entry to choose", model=model):
        inlay.plan(model, FishMask(density=1e-6, targets=["norm"]))


def test_expect_is_for_classifiers() -> None:
    model = ready("llama")
    with refused(ConfigError, r'fisher="expect" is for models that classify[\s\S]*\(1, 7, 64\)', model=model):
        inlay.attach(model, FishMask(density=0.1, fisher="expect"), data=data_for(model))
    with refused(ConfigError, r"models that classify\n  saw: no logits"):
        inlay.attach(Constant(), FishMask(density=0.5, fisher="expect"), data=[{"x": torch.ones(2, 3)}])
