"""What methods do around a step: with a loss scaler, accelerate, inside others, resumed; what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.authoring import Adapter, Composite, Init, Method, OutputDelta, Site, Step, hookimpl, setting
from inlay.errors import CheckpointError, ConfigError, MergedError, TrainingError
from inlay.testing.refusal import refused

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Sampled(OutputDelta):
    """Δy = g ⊙ m ⊙ y in training, m (out,) drawn for each step."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.gain = init.zeros(site.out_features)
        self.register_buffer("chosen", init.ones(site.out_features).detach(), persistent=False)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return (self.chosen * self.gain if self.training else self.gain) * y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain = 1 + self.gain.to(weight.dtype)
        return gain[:, None] * weight, None if bias is None else gain * bias


@dataclass(frozen=True, kw_only=True)
class Sampling(Method):
    """Draws which outputs learn in a step, and limits gains to the mean of what they were."""

    id: ClassVar[str] = "sampling"

    def delta(self, site: Site, init: Init) -> Sampled:
        return Sampled(site, init)

    @staticmethod
    @hookimpl
    def before_step(method: Sampling, adapter: Adapter, step: Step) -> None:
        generator = step.generator()
        for _, delta in adapter.placed:
            delta.chosen.copy_(torch.rand(delta.chosen.shape, generator=generator) < 0.5)

    @staticmethod
    @hookimpl
    def after_step(method: Sampling, adapter: Adapter, step: Step) -> None:
        for name, gain in adapter.named_parameters():
            mean = step.memory.get(name, torch.zeros_like(gain))
            step.memory[name] = mean = 0.9 * mean + 0.1 * gain.abs()
            gain.clamp_(-mean, mean)


def model_with(method: Method | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
    inlay.attach(model, method or Sampling(targets=["0", "2"]))
    return model.train()


def followed(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model), lr=0.1)
    return optimizer, inlay.lifecycle(model, optimizer, 10)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(X + step).square().mean().backward()
        optimizer.step()


def chosen(model: nn.Module) -> Tensor:
    return torch.cat([m.chosen for m in model.modules() if isinstance(m, Sampled)])


def test_a_resumed_run_is_the_same_bit_for_bit() -> None:
    whole = model_with()
    learn(whole, followed(whole)[0], 6)

    begun = model_with()
    optimizer, following = followed(begun)
    learn(begun, optimizer, 4)
    saved = (begun.state_dict(), optimizer.state_dict(), following.state_dict())

    resumed = model_with()
    optimizer, following = followed(resumed)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    following.load_state_dict(saved[2])
    assert torch.equal(chosen(begun), chosen(resumed)), "drawn again for the step that comes"
    learn(resumed, optimizer, 2, first=4)
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_step_that_the_loss_scaler_skips_is_none() -> None:
    model = model_with()
    optimizer, following = followed(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for loss, steps in ((float("inf"), 0), (1.0, 1)):
        drawn = chosen(model).clone()
        optimizer.zero_grad()
        scaler.scale(model(X).mean() * loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert following.step == steps
        assert torch.equal(drawn, chosen(model)) == (steps == 0)


def test_accelerate_drives_it_and_saves_it(tmp_path: Any) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = model_with()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(inlay.parameter_groups(model)))
    following = inlay.lifecycle(model, optimizer, 10)
    accelerator.register_for_checkpointing(following)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(X).mean())
            optimizer.step()
            optimizer.zero_grad()
    assert following.step == 3
    accelerator.save_state(str(tmp_path))
    before = following.state_dict()
    following.load_state_dict({"step": 0, "parts": {}})
    accelerator.load_state(str(tmp_path))
    assert following.step == 3
    assert all(
        torch.equal(t, following.state_dict()["parts"][path][name])
        for path, memory in before["parts"].items()
        for name, t in memory.items()
    )


@dataclass(frozen=True, kw_only=True)
class Around(Composite):
    """Holds one sampling method, twice as strong."""

    id: ClassVar[str] = "around"
    inner: Sampling = setting(Sampling())

    def parts(self) -> dict[str, Method]:
        return {"inner": self.inner}

    def combine(self, site: Site, children: Any, init: Init) -> OutputDelta:
        return Twice(children["inner"][0])


class Twice(OutputDelta):
    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, inner: Sampled) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return 2 * self.inner(x, y, at.part("inner"))


def test_methods_inside_others_act_too() -> None:
    model = model_with(Around(targets=["0", "2"]))
    optimizer, following = followed(model)
    drawn = chosen(model).clone()
    learn(model, optimizer, 1)
    assert not torch.equal(drawn, chosen(model))
    assert set(following.state_dict()["parts"]) == {"default/around/inner"}


def test_what_does_not_learn_does_not_act() -> None:
    model = model_with()
    inlay.attach(model, Sampling(targets=["0"]), "still", trainable=False)
    optimizer, following = followed(model)
    learn(model, optimizer, 1)
    assert set(following.state_dict()["parts"]) == {"default/sampling"}


def test_following_twice_is_following_once() -> None:
    model = model_with()
    optimizer, first = followed(model)
    second = inlay.lifecycle(model, optimizer, 10)
    learn(model, optimizer, 1)
    assert (first.step, second.step) == (0, 1)


def test_an_optimizer_that_is_not_followed_is_found() -> None:
    model = model_with()
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    model(X).mean().backward()
    text = r"a method acts around each optimizer step, and nothing tells it of them\n  saw: default/sampling"
    with refused(TrainingError, text, model=model):
        inlay.check_training(model, optimizer)
    inlay.lifecycle(model, optimizer)
    inlay.check_training(model, optimizer)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "ten"])
def test_steps_that_are_no_number(steps: Any) -> None:
    model = model_with()
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    with refused(ConfigError, "this cannot be a number of optimizer steps", model=model):
        inlay.lifecycle(model, optimizer, steps)


def test_the_state_of_another_stack() -> None:
    model = model_with()
    optimizer, following = followed(model)
    learn(model, optimizer, 1)
    saved = following.state_dict()
    inlay.attach(other := nn.Sequential(nn.Linear(4, 6)), Sampling(targets=["0"]), "fr")
    _, theirs = followed(other)
    with refused(CheckpointError, "this is the training state of another stack\n  saw: it names 'default"):
        theirs.load_state_dict(saved)
    assert theirs.step == 0


def test_not_while_merged() -> None:
    model = model_with()
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    inlay.merge(model)
    with refused(MergedError, "lifecycle is undefined while adapters are merged", model=model):
        inlay.lifecycle(model, optimizer)
