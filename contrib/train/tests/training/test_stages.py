"""Methods that train in stages: own optimizers and checkpoints, all the steps each; resumable in any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay import InlayError
from inlay.authoring import Adapter, Method, OutputDelta, Stage, hookimpl, register
from inlay.registry import registry
from inlay_train.trainer import Trainer

RANK, KEPT, STEPS = 4, 1, 6
EVERY = {"save_steps": 4, "eval_steps": 4}


class LowRank(OutputDelta):
    """BAx, A (r, in), B (out, r)."""

    def __init__(self, site: Any, init: Any, rank: int) -> None:
        super().__init__()
        self.A, self.B = init.normal(rank, site.in_features, std=0.1), init.zeros(site.out_features, rank)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return x @ self.A.T @ self.B.T


@dataclass(frozen=True)
class Pruned(Method):
    """Four directions learn first; then the one that moved most goes on alone."""

    id: ClassVar[str] = "pruned"
    lr: ClassVar[float] = 1e-2

    @staticmethod
    @hookimpl
    def inject(method: Method, sites: Any, adapter: Adapter) -> int:
        for site in sites:
            adapter.place(site, LowRank(site, adapter.init(site), KEPT if "kept" in adapter.data else RANK))
        return len(sites)

    @staticmethod
    @hookimpl
    def stages(method: Method, adapter: Adapter) -> list[Stage]:
        wide = Stage("wide", finish=prune)
        return [Stage("narrow")] if "kept" in adapter.data else [wide, Stage("narrow")]


@dataclass(frozen=True)
class Plain(Pruned):
    """Two directions, in one stage, beside the others."""

    id: ClassVar[str] = "plain"

    @staticmethod
    @hookimpl
    def inject(method: Method, sites: Any, adapter: Adapter) -> int:
        for site in sites:
            adapter.place(site, LowRank(site, adapter.init(site), 2))
        return len(sites)

    @staticmethod
    @hookimpl
    def stages(method: Method, adapter: Adapter) -> list[Stage]:
        return [Stage("train")]


def prune(adapter: Adapter) -> None:
    for _, delta in adapter.placed:
        best = delta.B.detach().norm(dim=0).topk(KEPT).indices
        delta.A, delta.B = nn.Parameter(delta.A.detach()[best]), nn.Parameter(delta.B.detach()[:, best])
    adapter.data["kept"] = KEPT


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    register(Pruned)
    register(Plain)
    yield
    registry.forget(Pruned)
    registry.forget(Plain)


STACK = Pruned() + Pruned(targets=("up",)).named("other") + Plain()


class Crash(transformers.TrainerCallback):
    """Ends training after so many steps in all, as if the process had died there."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


Made = Callable[..., Trainer]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("adapter-*.safetensors")))


def test_each_stage_has_its_steps_optimizer_and_checkpoints(made: Made, tmp_path: Path) -> None:
    trainer = made(STACK, output="run", **EVERY)
    trainer.train()
    folders = sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").glob("*/*"))
    assert folders == [f"_stage-{n}/checkpoint-{s}" for n in (1, 2) for s in (4, 6)]
    wide, narrow = (tensors(tmp_path / "run" / f"_stage-{n}" / "checkpoint-6") for n in (1, 2))
    assert {t.shape[0] for n, t in wide.items() if n.endswith("A")} == {RANK, 2}
    assert {t.shape[0] for n, t in narrow.items() if n.endswith("A")} == {KEPT, 2}
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert inlay.summary(trainer.model).trainable == sum(t.numel() for t in narrow.values())


@pytest.mark.slow
def test_resuming_in_any_stage_gives_the_same(made: Made, tmp_path: Path) -> None:
    """Before the first checkpoint, at the end of a stage, between two checkpoints of the next."""
    made(STACK, output="whole", **EVERY).train()
    last = Path("_stage-2") / f"checkpoint-{STEPS}"
    whole = tensors(tmp_path / "whole" / last)
    for after in (3, 6, 11):
        with pytest.raises(KeyboardInterrupt):
            made(STACK, output=str(after), **EVERY, callbacks=[Crash(after)]).train()
        torch.manual_seed(after)  # another process would begin with another state
        again = made(STACK, output=str(after), **EVERY)
        again.train(resume_from_checkpoint=again.last_checkpoint() is not None)
        found = tensors(tmp_path / str(after) / last)
        assert all(torch.equal(found[name], whole[name]) for name in whole), after


def test_the_best_step_is_chosen_in_the_last_stage(made: Made, tmp_path: Path) -> None:
    trainer = made(
        STACK,
        output="run",
        **EVERY,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    folder = Path(str(trainer.state.best_model_checkpoint))
    assert folder.parent == tmp_path / "run" / "_stage-2"
    inlay.save(trainer.model, tmp_path / "now")
    assert all(torch.equal(t, tensors(folder)[n]) for n, t in tensors(tmp_path / "now").items())
    assert trainer.args.load_best_model_at_end


def test_an_optimizer_of_ones_own_does_not_fit_stages(made: Made) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(
        InlayError, match=r"needs a new optimizer for each.*\n.*SGD, and the stages wide, narrow"
    ):
        made(STACK, output="run", **EVERY, optimizers=(optimizer, None))
