"""`inlay.masters.Masters`: float32 masters under 16-bit parameters, for any torch optimizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError, TrainingError
from inlay.masters import Masters
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, lively

pytest.importorskip("transformers")

STACK = "lora(rank=4) + ia3()"


def adapted(dtype: torch.dtype = torch.bfloat16, own: torch.dtype | None = None) -> nn.Module:
    """Return a lively Llama of one dtype with a stack, always the same but for rounding."""
    model = lively("llama").to(dtype)
    inlay.attach(model, STACK, name="fr", seed=1, dtype=own)
    return model.train()


def batches(model: nn.Module, count: int) -> list[dict[str, Any]]:
    return [batch_for(model, rows=4, seed=n % 4, labels=True) for n in range(count)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 60, first: int = 0) -> list[float]:
    losses = []
    for batch in batches(model, count)[first:]:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def own(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters() if p.requires_grad])


def masters(model: nn.Module, kind: Any = torch.optim.AdamW, **settings: Any) -> Masters:
    return Masters(kind, inlay.parameter_groups(model), **settings)


def test_a_bfloat16_run_with_masters_follows_the_float32_run_closer() -> None:
    exact, plain, kept = adapted(torch.float32), adapted(), adapted()
    start = own(exact)
    lr = 2e-4  # small steps are what bfloat16 loses
    train(exact, torch.optim.AdamW(inlay.parameter_groups(exact, lr=lr)))
    train(plain, torch.optim.AdamW(inlay.parameter_groups(plain, lr=lr)))
    train(kept, Masters(torch.optim.AdamW, inlay.parameter_groups(kept, lr=lr)))
    moved = own(exact) - start
    off = [float((own(m) - own(exact)).norm() / moved.norm()) for m in (plain, kept)]

    assert off[1] < 0.5 * off[0], off


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.01}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.NAdam, {}),
    ],
)
def test_a_step_is_that_of_the_optimizer_in_float32(kind: Any, settings: dict[str, Any]) -> None:
    """Parameter and gradient in bfloat16, the step in float32, then rounded once."""
    parameter = nn.Parameter(torch.randn(5, 3, dtype=torch.bfloat16))
    twin = nn.Parameter(parameter.detach().float())
    optimizer, plain = Masters(kind, [parameter], lr=1e-3, **settings), kind([twin], lr=1e-3, **settings)
    for number in range(5):
        gradient = torch.randn(5, 3, generator=torch.Generator().manual_seed(number)).bfloat16()
        parameter.grad, twin.grad = gradient, gradient.float()
        optimizer.step()
        plain.step()
        assert torch.equal(optimizer.masters[parameter], twin)
        assert torch.equal(parameter, twin.to(torch.bfloat16))


def test_lbfgs_evaluates_its_closure_at_what_the_masters_give() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.bfloat16))
    optimizer = Masters(torch.optim.LBFGS, [parameter], lr=0.5, max_iter=8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter.float() - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert torch.allclose(optimizer.masters[parameter], torch.ones(2), atol=0.02)


def test_a_parameter_in_float32_is_its_own_master() -> None:
    model = adapted(own=torch.float32)
    optimizer = masters(model)
    assert all(master is parameter for parameter, master in optimizer.masters.items())
    assert optimizer.state_dict()["masters"] == {}


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = adapted()
    optimizer = masters(whole)
    train(whole, optimizer, 6)
    inlay.save(whole, tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(whole, optimizer, 12, first=6)

    model = lively("llama").to(torch.bfloat16).train()
    inlay.load(model, tmp_path / "adapter", name="fr")
    resumed = masters(model)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(model, resumed, 12, first=6)
    assert torch.equal(own(model), own(whole))
    for mine, theirs in zip(resumed.masters.values(), optimizer.masters.values(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(next(iter(resumed.masters.values())), next(iter(resumed.masters)).float())


def test_schedulers_hooks_and_later_groups() -> None:
    first, second = (nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = Masters(torch.optim.SGD, [first], lr=1.0)
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    seen = list[str]()
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    first.grad, second.grad = (torch.full((2,), 2**-9, dtype=torch.bfloat16) for _ in range(2))
    optimizer.step()
    schedule.step()
    assert seen == ["before", "after"]
    optimizer.step()
    assert torch.equal(optimizer.masters[first], torch.full((2,), 1 - 1.5 * 2**-9))
    assert torch.equal(optimizer.masters[second], torch.full((2,), 1 - 0.75 * 2**-9))
    assert optimizer.state_dict()["mine"] == 1
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]


def test_what_something_else_writes_is_taken_over_entry_by_entry() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = Masters(torch.optim.SGD, [parameter], lr=1.0)
    parameter.grad = torch.full((3,), 2**-12, dtype=torch.bfloat16)
    optimizer.step()
    with torch.no_grad():
        parameter[0] = 5.0
    optimizer.step()
    assert optimizer.masters[parameter].tolist() == [5 - 2**-12, 1 - 2**-11, 1 - 2**-11]


def test_a_copy_is_an_optimizer_of_its_own() -> None:
    optimizer = Masters(torch.optim.AdamW, [nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], lr=0.1)
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, copied):
        parameter = one.param_groups[0]["params"][0]
        assert one.masters[parameter].tolist() == [1.0, 1.0]
    parameter = copied.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    copied.step()
    assert float(parameter[0].detach()) < 1.0
    assert float(optimizer.param_groups[0]["params"][0][0].detach()) == 1.0


def test_a_scaler_unscales_float16_and_skips_what_overflowed() -> None:
    """GradScaler refuses float16 gradients: those of float16 parameters gather in float32."""
    model = adapted(torch.float16)
    optimizer, scaler = masters(model), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before, skipped, losses = own(model), 0, list[float]()
    for batch in batches(model, 60):
        optimizer.zero_grad()
        loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        untouched = own(model)
        scaler.step(optimizer)
        if not norm.isfinite():
            assert torch.equal(own(model), untouched)
            skipped += 1
        scaler.update()
        losses.append(float(loss.detach()))
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert 10 < skipped < 50, skipped
    assert own(model).isfinite().all()
    assert distance(own(model), before) > 0.01
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


def test_gradients_gather_in_float32_where_asked_for() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    parameter.grad = torch.full((1,), 1.0, dtype=torch.bfloat16)
    Masters(torch.optim.SGD, [parameter], lr=1.0, gradients=torch.float32)
    for _ in range(3):
        (parameter * 2**-9).sum().backward()  # 1 + 2⁻⁹ is 1 in bfloat16
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32
    assert float(parameter.grad) == 1 + 3 * 2**-9


def test_training_is_proved_with_masters() -> None:
    model = adapted()
    optimizer = masters(model)
    model(**batches(model, 1)[0]).loss.backward()
    inlay.check_training(model, optimizer)


# -- refusals ----------------------------------------------------------------------------------------


def test_a_state_without_these_masters_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = Masters(torch.optim.AdamW, [parameter], lr=0.1)
    plain = torch.optim.AdamW([parameter], lr=0.1)
    with pytest.raises(ConfigError, match=r"0 masters in it, 1 parameters here have one"):
        optimizer.load_state_dict(plain.state_dict())
    other = Masters(torch.optim.AdamW, [nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], lr=0.1)
    with pytest.raises(ConfigError, match=r"does not hold the masters"):
        optimizer.load_state_dict(other.state_dict())


def test_exchanged_parameters_are_refused() -> None:
    optimizer = Masters(torch.optim.SGD, [nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], lr=0.1)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    with pytest.raises(TrainingError, match=r"exchanged for others[\s\S]*a parameter without a master"):
        optimizer.step()
