"""CorDA and LoRA-GA: starts that are measured on data, against the published definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError
from inlay.testing.effects import output
from inlay.testing.layers import deltas_of, fit, settled, watch
from inlay.testing.models import batch_for, build
from inlay.testing.quantised import packed
from inlay.testing.refusal import refused
from inlay.testing.tools import distance
from inlay_lora import CorDA, DoRA, LoRA, LoRAGA
from inlay_lora.corda import Moment
from inlay_lora.start import Layer, Start

PATH = "bert.encoder.layer.0.attention.self.query"


def data_for(model: nn.Module, rows: int = 6, count: int = 2) -> list[dict[str, Any]]:
    return [batch_for(model, rows=rows, length=9, labels=True, seed=seed) for seed in range(count)]


def started(start: Start, method: type = LoRA, family: str = "bert", **settings: Any) -> nn.Module:
    model = settled(family)
    settings = {"rank": 4, "alpha": 6, "targets": ["query", "down"], **settings}
    inlay.attach(model, method(start=start, **settings), data=data_for(model), seed=0)
    return model


# -- CorDA ---------------------------------------------------------------------------------------


def moment(path: str) -> Tensor:
    """Return C of what a layer of the plain model reads, each sample by itself, in float64."""
    model = settled("bert")
    total = torch.zeros(32, 32, dtype=torch.float64)
    for batch in data_for(model):
        for row in range(6):
            x = watch(model, path, {k: t[row : row + 1] for k, t in batch.items()})[0][0].double()
            x = x / x.abs().max()
            total += x.T @ x
    return total / 12


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_the_published_decomposition(mode: Any) -> None:
    model = started(CorDA(mode=mode))
    weight, c = settled("bert").get_submodule(PATH).weight.detach().double(), moment(PATH)
    damped = c + 0.01 * c.diagonal().mean() * torch.eye(32)
    left, singular, right = torch.linalg.svd(weight @ damped)
    r = slice(None, 4) if mode == "ipm" else slice(-4, None)
    part = left[:, r] @ singular[r].diag() @ right[r] @ damped.inverse()
    delta = deltas_of(model)[PATH]
    found = 1.5 * delta.up.detach().double() @ delta.down.detach().double()
    assert distance(found, part) < 1e-3
    assert distance(delta.up.norm(dim=0), (singular[r] / 1.5).sqrt()) < 1e-3
    if mode == "ipm":  # the least that any term of rank 4 leaves of W C
        assert ((weight - found) @ damped).norm() == pytest.approx(float(singular[4:].norm()), rel=1e-4)
    else:
        assert (found @ damped).norm() < 0.1 * (weight @ damped).norm()


def test_corda_of_inputs_of_every_direction_alike_is_pissa() -> None:
    layer = nn.Linear(12, 8)
    data = [{"input": torch.eye(12)[None]}]
    inlay.attach(layer, LoRA(rank=3, alpha=3, targets=[""], start=CorDA()), data=data)
    delta = deltas_of(layer)[""]
    left, singular, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    assert distance(delta.up @ delta.down, left[:, :3] * singular[:3] @ right[:3]) < 1e-5


def test_all_directions_of_corda_together_are_the_weight() -> None:
    delta = deltas_of(started(CorDA(), rank=32, alpha=32))[PATH]
    assert distance(delta.up @ delta.down, settled("bert").get_submodule(PATH).weight) < 1e-3


def test_damping_grows_until_there_is_an_inverse() -> None:
    found = Moment(Layer(inlay.anatomy(settled("bert")).leaves[0], 1, 1.0).site)
    found.total, found.samples = torch.diag(torch.tensor([1e8, 0.0, 0.0])), 1
    damped, inverse = found.damped(1e-12)
    assert (damped @ inverse - torch.eye(3)).norm() < 0.05
    assert damped[1, 1] > 0


# -- LoRA-GA -------------------------------------------------------------------------------------


def mean_gradient(path: str) -> Tensor:
    """Return the mean gradient (out, in) of the plain model's loss, in float64, by autograd."""
    model = settled("bert").double()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for batch in data_for(model):
        (model(**batch).loss / 2).backward()
    return model.get_submodule(path).weight.grad


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_lora_ga_takes_disjoint_directions_of_the_gradient(direction: Any) -> None:
    model = started(LoRAGA(direction=direction, scale="unit"))
    left, _, right = torch.linalg.svd(mean_gradient(PATH))
    delta = deltas_of(model)[PATH]
    a, b = (right[:8] @ delta.down.T.double()).abs(), (left[:, :8].T @ delta.up.double()).abs()
    chosen = a.argmax(0).tolist(), b.argmax(0).tolist()
    torch.testing.assert_close(a.amax(0), torch.ones(4).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(b.amax(0), torch.ones(4).double(), atol=1e-3, rtol=0)
    first, last = [0, 1, 2, 3], [4, 5, 6, 7]
    expected = {"ArB2r": (first, last), "A2rBr": (last, first), "ArBr": ([1, 3, 5, 7], [0, 2, 4, 6])}
    assert chosen == expected.get(direction, chosen)
    assert sorted(chosen[0] + chosen[1]) == list(range(8))


@pytest.mark.parametrize("scale", ["stable", "unit", "gd", "weight_svd"])
def test_lora_ga_scales_both_factors(scale: Any) -> None:
    model = started(LoRAGA(scale=scale, gamma=64.0))
    sigma = torch.linalg.svdvals(settled("bert").get_submodule(PATH).weight.detach())[:4]
    mean = float((sigma / 1.5).sqrt().mean())
    c = {"stable": 32**0.25 / 8, "unit": 1.0, "gd": 1 / 1.5, "weight_svd": mean}[scale]
    delta = deltas_of(model)[PATH]
    for square in (delta.down @ delta.down.T, delta.up.T @ delta.up):
        torch.testing.assert_close(square.detach(), c * c * torch.eye(4), atol=1e-4 * c * c, rtol=1e-4)


def test_lora_ga_clips_what_is_larger_than_the_weight() -> None:
    layer = settled("bert").get_submodule(PATH)
    both = [started(LoRAGA(scale="unit", norm_clip=clip), alpha=24) for clip in (False, True)]
    free, clipped = (deltas_of(model)[PATH] for model in both)
    ratio = (layer.weight.abs().max() / (6 * free.up @ free.down).abs().max()).detach()
    assert ratio < 1
    assert distance(clipped.up, free.up * ratio.sqrt()) < 1e-5
    assert distance(clipped.down, free.down * ratio.sqrt()) < 1e-5


def test_the_first_step_goes_where_full_training_would() -> None:
    """The change of the weight at one gradient step, B₀ dA + dB A₀, against −G: nearer than LoRA's."""
    gradient, cosines = mean_gradient(PATH), []
    for start in (LoRAGA(), None):
        settings = {} if start is None else {"start": start}
        model = settled("bert")
        inlay.attach(model, LoRA(rank=4, alpha=6, **settings), data=data_for(model), seed=0)
        for batch in data_for(model):
            (model(**batch).loss / 2).backward()
        delta = deltas_of(model)[PATH]
        step = (delta.up @ delta.down.grad + delta.up.grad @ delta.down).detach()
        cosines.append(float(torch.cosine_similarity(step.flatten().double(), gradient.flatten(), dim=0)))
    assert cosines[0] > cosines[1] + 0.1
    assert cosines[0] > 0.7


# -- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [CorDA(), CorDA(mode="kpm"), LoRAGA()], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "t5", "mixtral"])
def test_the_output_is_the_base_s_at_the_start_and_flags_stay(start: Start, family: str) -> None:
    if family == "mixtral" and isinstance(start, CorDA):
        return
    model = build(family)
    data = data_for(model)
    output(model)
    before, flags = output(model), [p.requires_grad for p in model.parameters()]
    targets = ["both.query", "both.down"] if family == "t5" else ["query", "down"]
    inlay.attach(model, LoRA(rank=2, start=start, targets=targets), data=data, seed=0)
    assert torch.equal(output(model), before)
    assert all(bool(delta.up.any()) for delta in deltas_of(model).values())
    inlay.detach(model)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("start", [CorDA(), LoRAGA(gamma=64.0)], ids=str)
def test_it_learns(start: Start, method: type) -> None:
    model = settled("bert")
    batch = batch_for(model, rows=6, labels=True)
    inlay.attach(model, method(start=start), train=("head",), data=[batch], seed=0)
    before, after = fit(model, batch)
    assert after < 0.1 * before


class Idle(nn.Module):
    """A model one of whose layers reads zeros, and takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        self.idle(torch.zeros_like(x))
        logits = self.layer(x)

        class Result:
            loss = nn.functional.cross_entropy(logits, labels)

        return Result()


def test_what_cannot_be_measured_is_refused() -> None:
    model = build("bert")
    for method, message in (
        (
            LoRA(start=CorDA(), targets=["embedding"]),
            r"corda: this start is for linear .*\n.*embedding",
        ),
        (
            LoRA(start=LoRAGA(), targets=["embedding"]),
            r"lora_ga: this start needs the .*\n.*embedding",
        ),
        (
            LoRA(rank=17, start=LoRAGA()),
            r"lora_ga: .* takes 2·rank .*\n.*rank 17 .*, 32 to 32 .*\n.*most 16",
        ),
    ):
        with refused(ConfigError, message, model=model):
            inlay.attach(model, method, data=data_for(model))
    idle = Idle()
    data = [{"x": torch.randn(5, 8), "labels": torch.arange(5) % 4}]
    for start, message in (
        (CorDA(), r"corda: a layer reads nothing but zeros\n  saw: idle"),
        (LoRAGA(), r"lora_ga: a layer has no gradient to start along\n  saw: idle: none"),
    ):
        with refused(ConfigError, message, model=idle):
            inlay.attach(idle, LoRA(rank=1, targets=["layer", "idle"], start=start), data=data)


def test_gradients_need_a_base_of_full_precision() -> None:
    pytest.importorskip("bitsandbytes")
    model = packed("llama", "nf4", hidden_size=64, intermediate_size=128)
    with refused(ConfigError, r"lora_ga: this start needs .*\n.*q_proj, in few bits", model=model):
        inlay.attach(model, LoRA(start=LoRAGA()), data=data_for(model))
