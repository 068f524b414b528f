"""Lightning: the adapter alone in its checkpoints, resuming, and proof of training, in real fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay import InlayError
from inlay.authoring import Method, OutputDelta, hookimpl, register
from inlay.errors import TrainingError
from inlay.registry import registry
from inlay.testing.models import batch_for, build

pytestmark = [
    pytest.mark.xdist_group("lightning"),  # imported once
    pytest.mark.filterwarnings("default"),  # theirs are not ours
]


class Plus(OutputDelta):
    """y + b"""

    def __init__(self, site: Any, init: Any) -> None:
        super().__init__()
        self.b = init.zeros(site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return self.b


@dataclass(frozen=True)
class Shaken(Method):
    """A bias, moved at random after each step: the same only where steps are counted the same."""

    id: ClassVar[str] = "shaken"
    default_targets: ClassVar[tuple[str, ...]] = ("query",)

    def delta(self, site: Any, init: Any) -> Plus:
        return Plus(site, init)

    @staticmethod
    @hookimpl
    def after_step(method: Method, adapter: Any, step: Any) -> None:
        for _, parameter in adapter.named_parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=step.generator())


@pytest.fixture(autouse=True)
def shaken() -> Iterator[None]:
    register(Shaken)
    yield
    registry.forget(Shaken)


@cache
def engine() -> Any:
    """Lightning, imported where a test runs and not where it is collected: that takes seconds."""
    return pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")


@cache
def fit_class() -> Any:
    class Fit(engine().LightningModule):
        """A language model's loss, and a scale of its own that learns nothing."""

        def __init__(self, model: nn.Module, *, everything: bool = False, optimizers: int = 1) -> None:
            super().__init__()
            self.model, self.everything, self.optimizers_wanted = model, everything, optimizers
            self.register_buffer("seen", torch.zeros(()))
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            self.seen += 1
            loss = self.model(**batch).loss + inlay.auxiliary_loss(self.model)
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            groups = self.parameters() if self.everything else inlay.parameter_groups(self.model, lr=0.02)
            made = [torch.optim.AdamW(groups, lr=0.02)]
            if self.optimizers_wanted > 1:
                self.automatic_optimization = False
                made.append(torch.optim.SGD(self.parameters(), lr=0.02))
            return made

    return Fit


def batches(model: nn.Module) -> Any:
    rows = [batch_for(model, seed=i, labels=True) for i in range(4)]
    return torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


def module(stack: str = "lora(rank=4) + shaken()", **more: Any) -> Any:
    model = build("llama")
    if stack:
        inlay.attach(model, stack, "fr", seed=0)
    return fit_class()(model, **more)


def fit(fitted: Any, folder: Path, *, epochs: int = 2, path: str | None = None, **more: Any) -> Any:
    from inlay_lightning import AdapterCallback

    lightning = engine()
    lightning.seed_everything(0)
    saving = lightning.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    own = AdapterCallback(folder / "stack")
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[saving, own], logger=False,
        enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip
    trainer.fit(fitted, batches(fitted.model), ckpt_path=path)
    return trainer


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "inlay" in n.split(".")}


def test_checkpoints_hold_the_adapters_and_what_is_the_modules_own(tmp_path: Path) -> None:
    fitted = module()
    before = {n: t.clone() for n, t in build("llama").state_dict().items()}
    fit(fitted, tmp_path)
    assert fitted.losses[-1] < fitted.losses[0]
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)["state_dict"]
    assert "seen" in saved
    assert all("inlay" in n.split(".") for n in saved if n != "seen")
    assert {n.removeprefix("model.") for n in saved} - {"seen"} >= set(adapters(fitted.model))
    fresh = build("llama")
    inlay.load(fresh, tmp_path / "stack")
    batch = batch_for(fresh)
    assert torch.equal(fresh.eval()(**batch).logits, fitted.model.eval()(**batch).logits)
    inlay.detach(fitted.model)
    now = fitted.model.state_dict()
    assert all(torch.equal(now[n], before[n]) for n in before)


@pytest.mark.parametrize("more", [{}, {"accumulate_grad_batches": 2}])
def test_resuming_gives_the_same(tmp_path: Path, more: dict[str, int]) -> None:
    whole, again = module(), module()
    fit(whole, tmp_path / "whole", **more)
    fit(again, tmp_path / "again", path=str(tmp_path / "whole" / "epoch=0.ckpt"), **more)
    assert len(again.losses) == 4
    assert again.losses == whole.losses[4:]
    found = adapters(again.model)
    assert found
    assert all(torch.equal(found[n], t) for n, t in adapters(whole.model).items())


@pytest.mark.parametrize(
    ("stack", "more"),
    [("lora(rank=4) + ia3()", "are missing in it"), ("lora(rank=4, targets=['key'])", "are in it alone")],
)
def test_a_checkpoint_of_another_stack_is_refused(tmp_path: Path, stack: str, more: str) -> None:
    fit(module("lora(rank=4, targets=['key', 'value'])"), tmp_path, epochs=1)
    with pytest.raises(InlayError, match=rf"another module or stack(.|\n)*saw: model\..*inlay.*{more}"):
        fit(module(stack), tmp_path / "other", path=str(tmp_path / "epoch=0.ckpt"))


def test_an_optimizer_of_everything_is_caught_after_the_first_backward(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the optimizer holds a tensor that does not learn"):
        fit(module(everything=True), tmp_path)


def test_a_module_without_a_stack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InlayError, match=r"this Fit should hold one model with a stack(.|\n)*saw: 0 of them"):
        fit(module("", everything=True), tmp_path)


def test_two_optimizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InlayError, match=r"learns by one optimizer(.|\n)*saw: 2 optimizers"):
        fit(module(optimizers=2), tmp_path)
