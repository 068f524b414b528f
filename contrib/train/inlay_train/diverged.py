"""Training that ran into numbers that are not finite: which part has the first of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.errors import TrainingError

if TYPE_CHECKING:
    from inlay_train.trainer import Trainer


def error(trainer: Trainer, what: str, inputs: Any = None) -> TrainingError:
    """Return the error that names the first part, tensor or module that is not finite.

    `inputs` are those of a loss that is not; without them the gradients are not.
    """
    rates = sorted({group["lr"] for group in trainer.optimizer.param_groups}) if trainer.optimizer else []
    good = trainer.last_checkpoint()
    kept = f"the last good checkpoint is {good}" if good is not None else "there is no checkpoint yet"
    return TrainingError(
        f"training diverged: {what}",
        saw=_bad_values(trainer) or (_bad_output(trainer, inputs) if inputs else _bad_gradients(trainer)),
        do=f"lower the learning rate (now {', '.join(f'{rate:.3g}' for rate in rates)}), or clip; {kept}",
    )


def bad_tensors(trainer: Trainer) -> list[tuple[str, str]]:
    """Return (part, name) of every trained tensor with values that are not finite, in the model's order."""
    return [(part, name) for part, name, tensor in _learning(trainer) if not tensor.isfinite().all()]


def _bad_values(trainer: Trainer) -> str:
    bad = bad_tensors(trainer)
    return f"{_first(bad)} values that are not finite" if bad else ""


def _bad_gradients(trainer: Trainer) -> str:
    found = _learning(trainer)
    bad = [(part, name) for part, name, p in found if p.grad is not None and not p.grad.isfinite().all()]
    return f"{_first(bad)} a gradient that is not finite" if bad else ""


def _first(bad: list[tuple[str, str]]) -> str:
    part, name = bad[0]
    inside = [n for p, n in bad if p == part]
    return f"the part {part}: {len(inside)} of its tensors, the first {name}, have"


def _bad_output(trainer: Trainer, inputs: Any) -> str:
    """Run the model once more to see the first module whose output is not finite."""
    seen: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and not first.isfinite().all():
                seen.append(name)

        return hook

    hooks = [m.register_forward_hook(look(n)) for n, m in trainer.model.named_modules() if n]
    try:
        with torch.no_grad():
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    place = f"the first output that is not is that of {seen[0]}" if seen else "so is every output"
    largest, part, name = max(
        (float(p.detach().abs().max()), part, name) for part, name, p in _learning(trainer)
    )
    return f"every trained value is finite, the largest {largest:.2g} in the part {part} ({name}); {place}"


def _learning(trainer: Trainer) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield (part, name, parameter) of what learns, in the model's order."""
    groups = trainer.optimizer.param_groups if trainer.optimizer is not None else []
    parts = {id(p): group.get("name", "model") for group in groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            yield parts.get(id(parameter), "model"), name, parameter
