"""EVA: how it goes through the data, layers that lose their adapter, files, learning, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError
from inlay.stack import Stack
from inlay.testing import elsewhere
from inlay.testing.effects import output
from inlay.testing.layers import deltas_of, fit, settled
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay.testing.snapshots import digest
from inlay.testing.tools import distance, shake
from inlay_lora import EVA, DoRA, LoRA

ALL = ["query", "key", "value", "output", "up", "down"]


def data_for(model: nn.Module) -> list[dict[str, Any]]:
    return [batch_for(model, rows=6, seed=seed, labels=True) for seed in range(3)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Counting(nn.Module):
    """A layer that counts its model's calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


def test_it_stops_when_the_directions_stay_and_never_goes_on_for_ever() -> None:
    scales = 2.0 ** -torch.arange(8)
    for data, calls in (
        ([{"x": noise(50, 8) * scales}], 2),  # the same batch again: nothing moves
        ([{"x": noise(500, 8, seed=n) * scales} for n in range(100)], 2),
        ([{"x": noise(9, 8, seed=n)} for n in range(2)], None),  # no directions to speak of
    ):
        model = Counting()
        inlay.attach(model, LoRA(rank=2, targets=["layer"], start=EVA(rho=1.0, tau=0.9)), data=data)
        assert 2 <= model.calls <= 20
        assert calls in (None, model.calls)
    model = Counting()
    changing = ({"x": noise(40, 8, seed=n)} for n in range(7))
    inlay.attach(model, LoRA(rank=3, targets=["layer"], start=EVA(rho=1.0, tau=1.0)), data=changing)
    assert model.calls == 70


def test_the_first_directions_hardly_depend_on_the_order_of_the_batches() -> None:
    starts, scales = [], 3.0 ** -torch.arange(8)
    batches = [{"x": noise(64, 8, seed=n) * scales} for n in range(4)]
    for data in (batches, batches[::-1]):
        model = Counting()
        inlay.attach(model, LoRA(rank=3, targets=["layer"], start=EVA(rho=1.0, tau=1.0)), data=data)
        starts.append(deltas_of(model)["layer"].down.detach())
    assert (starts[0] * starts[1]).sum(1).min() > 0.99


def test_inputs_of_a_plane_are_spanned_by_the_first_two_rows() -> None:
    model, x = Counting(), noise(60, 2) @ noise(2, 8, seed=1) + noise(8, seed=2)
    inlay.attach(model, LoRA(rank=4, targets=["layer"], start=EVA(rho=1.0)), data=[{"x": x}])
    rows = deltas_of(model)["layer"].down[:2].detach()
    centred = x - x.mean(0)
    assert (centred - centred @ rows.T @ rows).norm() < 1e-4 * centred.norm()


class TwoReaders(nn.Module):
    """One layer reads a plane (two directions), the other six features of one variance."""

    def __init__(self) -> None:
        super().__init__()
        self.plane, self.ball = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.plane(x[..., :2] @ torch.eye(2, 6)) + self.ball(x)


def test_a_layer_of_rank_0_gets_no_adapter(tmp_path: Path) -> None:
    """Each of the plane's two directions explains more than any of the ball's six."""
    torch.manual_seed(0)
    model, x = TwoReaders(), noise(200, 6)
    fresh = copy.deepcopy(model)
    inlay.attach(model, LoRA(rank=1, targets=["plane", "ball"], start=EVA(rho=2.0)), data=[{"x": x}])
    assert {name: len(delta.down) for name, delta in deltas_of(model).items()} == {"plane": 2}
    assert type(model.ball) is nn.Linear
    shake(model)
    inlay.save(model, tmp_path)
    assert inlay.load(fresh, tmp_path) == 2
    assert torch.equal(fresh(x), model(x))
    inlay.merge(fresh)
    torch.testing.assert_close(fresh(x), model(x), atol=1e-5, rtol=1e-5)


# -- data, files, learning -----------------------------------------------------------------------


def test_it_is_written_as_data() -> None:
    text = "lora(rank=4, start=eva(rho=1.5, whiten=True))"
    method = LoRA(rank=4, start=EVA(rho=1.5, whiten=True))
    assert Stack.of(text).parts[0].method == method
    settings = json.loads(json.dumps(method.to_dict()))["start"]
    assert settings == {
        "strategy": "eva",
        "settings": {"rho": 1.5, "tau": 0.99, "whiten": True, "label_mask": True},
    }
    assert Stack.of("dora(start=eva())").parts[0].method == DoRA(start=EVA())
    assert not LoRA().calibrates
    assert method.calibrates


def test_it_loads_in_another_process_without_data(tmp_path: Path) -> None:
    """The file has the factors alone, at their ranks: where they started is no part of it."""
    model = build("bert", initializer_range=0.2)
    inlay.attach(model, LoRA(rank=3, targets=ALL, start=EVA()), data=data_for(model))
    deltas = deltas_of(model)
    shake(model)
    inlay.save(model, tmp_path)
    part = json.loads((tmp_path / "inlay.json").read_text())["parts"][0]
    assert part["calibration"] == []
    assert sum(part["data"]["ranks"].values()) == 3 * 12
    file = next(tmp_path.glob("*.safetensors"))
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == 4 * sum(d.down.numel() + d.up.numel() for d in deltas.values())
    answer = elsewhere.ask(folder=str(tmp_path), family="bert", seed=0, dtype="float32", modules={})
    assert answer.get("digest") == digest({"logits": output(model)}), answer


def test_it_learns_and_merges() -> None:
    model = settled("bert")
    batch = batch_for(model, rows=8, labels=True)
    inlay.attach(model, LoRA(rank=4, targets=ALL, start=EVA()), train=("head",), data=[batch], seed=0)
    before, after = fit(model, batch)
    assert after < 0.2 * before
    adapted = output(model)
    inlay.merge(model, undo=False)
    assert distance(output(model), adapted) < 1e-5


# -- refusals ------------------------------------------------------------------------------------


def test_what_it_refuses() -> None:
    model = build("bert")
    model(**batch_for(model, labels=True))
    method = LoRA(rank=4, start=EVA())
    one = {"input_ids": torch.tensor([[5, 6]])}
    for what, data, message in (
        (method, None, r"'lora' must see data before it is placed"),
        (method, [], "there is nothing to calibrate on"),
        (method, [one], r"eva: too little is read[\s\S]*query: 2 tokens of 32 features, rank 4"),
        (LoRA(rank=33, start=EVA()), data_for(model), r"eva: too little is read[\s\S]*32 features, rank 33"),
        (LoRA(start=EVA(), targets=["embedding"]), [one], "eva: no target is a linear layer"),
    ):
        with refused(ConfigError, message, model=model):
            inlay.attach(model, what, data=data)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[6] = torch.inf
    with refused(ConfigError, r"eva: a layer reads values that are not finite\n  saw: bert", model=model):
        inlay.attach(model, method, data=[one])


class Idle(Counting):
    """A model that never calls one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(8, 4)


def test_a_layer_that_is_never_called() -> None:
    model = Idle()
    with refused(ConfigError, r"eva: a layer read nothing in all the data\n  saw: idle and 0 more"):
        inlay.attach(model, LoRA(rank=2, targets=["layer", "idle"], start=EVA()), data=[{"x": noise(30, 8)}])
