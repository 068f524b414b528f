"""What a Lightning run needs beside inlay's optimizer groups and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

import inlay
from inlay import InlayError

OURS = "inlay"  # the child that holds a module's deltas


class AdapterCallback(Callback):
    """Checkpoints hold the adapters of the module's model and not its base; training is proved once.

    Methods that act around steps are driven; `folder`: where the stack is saved when training ends.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self._following: Any = None
        self._saved: dict[str, Any] = {}
        self._checked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.strict_loading = False  # the base is not in a checkpoint; the rest is checked below

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _, model = adapted(pl_module)
        self._checked = False
        if len(trainer.optimizers) != 1:
            raise InlayError(
                "an adapted model learns by one optimizer, with a group for each part",
                saw=f"{len(trainer.optimizers)} optimizers",
                do="return one from configure_optimizers, over inlay.parameter_groups(model)",
            )
        self._following = inlay.lifecycle(model, trainer.optimizers[0], _steps(trainer))
        if self._saved:
            self._following.load_state_dict(self._saved)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._checked:
            inlay.check_training(adapted(pl_module)[1], trainer.optimizers[0])
            self._checked = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is not None and trainer.is_global_zero:
            inlay.save(adapted(pl_module)[1], self.folder, overwrite=True)

    def state_dict(self) -> dict[str, Any]:
        return self._saved if self._following is None else self._following.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict  # there is no optimizer yet

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Any) -> None:
        path, _ = adapted(pl_module)
        tensors = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensors[name] for name in tensors if not is_base(name, path)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Any) -> None:
        """Raise unless the checkpoint holds all that is not the base, and nothing else."""
        path, _ = adapted(pl_module)
        wanted = {name for name in pl_module.state_dict() if not is_base(name, path)}
        if wrong := sorted(wanted ^ checkpoint["state_dict"].keys()):
            raise InlayError(
                "this checkpoint is of another module or stack",
                saw=f"{wrong[0]} and {len(wrong) - 1} more are "
                + ("missing in it" if wrong[0] in wanted else "in it alone"),
                do="attach the stack that was trained, under the same name, then fit(ckpt_path=...)",
            )


def adapted(module: nn.Module) -> tuple[str, nn.Module]:
    """Return the path and the model that a stack is attached to, in a LightningModule."""
    found = [(name, m) for name, m in module.named_modules() if inlay.summary(m).parts]
    if len(found) != 1:
        raise InlayError(
            f"this {type(module).__name__} should hold one model with a stack",
            saw=f"{len(found)} of them" + (f": {', '.join(name for name, _ in found)}" if found else ""),
            do="inlay.attach(model, ...) before fit, or use a callback of your own",
        )
    return found[0]


def is_base(name: str, path: str) -> bool:
    """Return whether a tensor called `name` is one of the base's of the model at `path`."""
    inside = not path or name.startswith(f"{path}.")
    return inside and OURS not in name.split(".")


def _steps(trainer: Trainer) -> int | None:
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < float("inf") else None
