"""An adapted model as transformers and accelerate see it: what they miss, and what they put in its way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

import inlay
from inlay import InlayError
from inlay.authoring import Trained

# What training sets in a model's configuration.
ALIGNED = ("problem_type", "pad_token_id", "bos_token_id", "eos_token_id")


def aligned(model: Any) -> dict[str, Any]:
    """Return what the model's configuration holds of what training sets there."""
    own = model.config.__dict__ if hasattr(model, "config") else {}
    return {name: own[name] for name in ALIGNED if name in own}


def align(model: Any, values: dict[str, Any]) -> None:
    """Let the model's configuration hold exactly these of what training sets there."""
    if hasattr(model, "config"):
        for name in ALIGNED:
            model.config.__dict__.pop(name, None)
        model.config.__dict__.update(values)


def adapters(model: nn.Module) -> Sequence[str]:
    """Return the name of the adapter of each attached part, in order."""
    return [part.path.partition("/")[0] for part in inlay.summary(model).parts]


def learning_adapter(model: nn.Module) -> str | None:
    """Return the one adapter of the model that learns, or None where nothing is attached."""
    parts = inlay.summary(model).parts
    names = list(dict.fromkeys(n for n, p in zip(adapters(model), parts, strict=True) if p.trainable))
    if len(names) > 1 or (parts and not names):
        raise InlayError(
            "it is not clear which adapter is to be trained",
            saw=f"adapters that learn: {', '.join(map(repr, names)) or 'none'}",
            do="pass adapter=, or let one learn: inlay.set_trainable(model, name)",
        )
    return names[0] if names else None


@contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Take what engines put in front of the model's forward off for a while.

    accelerate's mixed precision and TRL's head stand on the instance, where inlay allows nothing
    that might bypass an adapter.
    """
    instance = model.__dict__.get("forward")
    known = "_original_forward" in model.__dict__ or (
        instance is not None and getattr(instance, "__wrapped__", None) is type(model).forward
    )
    if known:
        model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if known and instance is not None:
            model.__dict__["forward"] = instance


@contextmanager
def quantised_base_accepted(model: Any, adapter: str | None) -> Iterator[None]:
    """Let transformers build a Trainer for a quantised base: it looks for peft's adapters only."""
    if adapter is None:
        yield
        return
    had = model.__dict__.get("_hf_peft_config_loaded")
    model.__dict__["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        if had is None:
            del model.__dict__["_hf_peft_config_loaded"]
        else:
            model.__dict__["_hf_peft_config_loaded"] = had


def four_bit_layers(model: nn.Module) -> list[nn.Module]:
    """Return bitsandbytes' layers of 4 bits."""
    return [m for m in model.modules() if any(kind.__name__ == "Linear4bit" for kind in type(m).__mro__)]


def heads(model: nn.Module | None) -> tuple[str, ...]:
    """Return the names of the model's heads: they are not quantised."""
    try:
        planned = inlay.plan(model, Trained())  # type: ignore[arg-type]
    except InlayError:
        return ()
    return tuple(site.name for part in planned.parts for site in part.sites)


def reaches_heads(model: nn.Module, stack: Any) -> bool:
    """Return whether the stack acts on the model's heads by itself, so that nothing need learn beside it."""
    reached = {site.name for part in inlay.plan(model, stack).parts for site in part.sites}
    return reached.issuperset(heads(model))
