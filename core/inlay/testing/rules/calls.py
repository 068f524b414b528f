"""R27 to R31: whoever calls the model, and however: padded, step by step, recomputed, autocast, compiled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay.testing.cases import Case
from inlay.testing.decoding import stepwise, tokens, whole
from inlay.testing.effects import (
    acting,
    backward,
    close,
    gradients_of,
    output,
    output_of,
    share,
    without_gradient,
)
from inlay.testing.models import batch_for
from inlay.testing.rule import need, rule

CLOSE = 1e-5  # float32: sums are split and ordered otherwise
CODERS = ("llama", "gpt2", "t5")


def padded(batch: dict[str, Any], *, left: bool = False) -> dict[str, Any]:
    """Return a text batch whose rows have different lengths; images as they are.

    Padded on the left it says at what positions the tokens stand, as transformers' `generate` does.
    """
    if "input_ids" not in batch:
        return batch
    mask = torch.ones_like(batch["input_ids"])
    for number, row in enumerate(mask):
        row[len(row) - number % 3 :] = 0
    if not left:
        return {**batch, "attention_mask": mask}
    mask = mask.flip(1)
    return {**batch, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def cut(batch: Mapping[str, Any], row: int) -> tuple[dict[str, Any], slice]:
    """Return one row of a padded batch without its padding, and where its tokens were."""
    one = {key: value[row : row + 1] for key, value in batch.items()}
    if "attention_mask" not in one:
        return one, slice(None)
    real = one.pop("attention_mask")[0].nonzero().flatten()
    own = slice(int(real[0]), int(real[-1]) + 1)
    one.pop("position_ids", None)
    return {**one, "input_ids": one["input_ids"][:, own]}, own


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of one training step, dropout and all, by name."""
    model.zero_grad()
    backward(model, seed=3)
    found = gradients_of(model)
    model.zero_grad()
    return found


def same_gradients(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], how: str) -> None:
    """Raise unless two sets of gradients are the same, as a whole and each beside the whole."""
    need(found.keys() == wanted.keys(), f"{how}: other tensors get gradients: {found.keys() ^ wanted.keys()}")
    size = torch.cat([t.flatten() for t in wanted.values()]).norm()
    for name, gradient in wanted.items():
        off = float((found[name] - gradient).norm() / max(size, torch.finfo(torch.float32).tiny))
        need(off <= CLOSE, f"{how}: the gradient of {name} is {off:.1e} of the whole off")


@rule(
    "R27",
    "Every row is its own",
    means="a row of a batch padded on the right (decoders: on the left too) gives at its own tokens "
    "what it gives alone and without padding, to 1e-5, whatever shapes were seen before.",
    usually="a delta mixes rows or positions, keeps a tensor of an earlier call's shape, or ignores "
    "the mask.",
    dtypes=("float32",),
    share=0.5,
)
def rows_are_their_own(case: Case) -> None:
    model = acting(case)
    for left in (False, True) if case.family in ("llama", "gpt2") else (False,):
        batch = padded(batch_for(model, rows=4, seed=case.seed), left=left)
        together = output(model, batch)
        for row in range(4):
            one, own = cut(batch, row)
            alone, mine = output(model, one), together[row : row + 1]
            if alone.dim() == 3 and case.family != "t5":  # a decoder's own tokens are all there
                mine = mine[:, own]
            need(close(mine, alone, CLOSE), f"row {row} is {share(mine, alone):.1e} off the row alone")


@rule(
    "R28",
    "A cache changes nothing",
    means="a prefill, a chunk and single tokens through the cache give the logits of one whole call, "
    "to 1e-5.",
    usually="a delta takes the length of the call for the length of the text, or adds its tokens to "
    "the cache.",
    dtypes=("float32",),
    share=0.5,
    families=CODERS,
)
def caches(case: Case) -> None:
    model = acting(case)
    ids = tokens(rows=2, length=9, seed=case.seed)
    once, cached = whole(model, ids), stepwise(model, ids, None, (4, 2, 1, 1, 1))
    need(close(cached, once, CLOSE), f"through the cache the logits are {share(cached, once):.1e} off")


@rule(
    "R29",
    "Gradient checkpointing changes nothing",
    means="with gradient checkpointing, reentrant or not, every gradient is that of a run without it.",
    usually="a delta keeps state that a second run of the block finds changed, or draws outside "
    "torch's generators, which the checkpointer restores.",
    dtypes=("float32",),
    share=0.5,
)
def checkpoints(case: Case) -> None:
    model = acting(case)
    wanted = gradients(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        same_gradients(gradients(model), wanted, f"checkpointing (use_reentrant={reentrant})")


@rule(
    "R30",
    "Autocast works",
    means="under torch.autocast in bfloat16 the float32 model gives logits of the base's own dtype and "
    "close to those without, and finite gradients in each tensor's own dtype.",
    usually="two tensors of different dtypes meet in an operation that autocast does not convert for, "
    "or the result is cast to the parameter's dtype.",
    dtypes=("float32",),
    share=0.5,
)
def autocasts(case: Case) -> None:
    model = acting(case)
    plain = output(model)
    with torch.autocast("cpu", torch.bfloat16):
        base, adapted = output_of(model), output(model)
        backward(model)
    need(adapted.dtype == base.dtype, f"the logits became {adapted.dtype}, the base's are {base.dtype}")
    off = max(share(base.float(), output_of(model)), 1e-2)
    need(share(adapted.float(), plain) <= 5 * off, f"the logits are {share(adapted.float(), plain):.1e} off")
    wrong = without_gradient(model)
    need(not wrong, f"the gradient of {wrong[:1]} is missing, of another dtype or not finite")


@contextmanager
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


@rule(
    "R31",
    "It compiles in one graph",
    means="torch.compile(fullgraph=True) traces forward and backward without a break, and gives the "
    "same logits and gradients (traced by AOT autograd; code for a device is not generated).",
    usually="a forward branches on a tensor's values, calls .item() or a module that cannot be traced, "
    "or keeps state between calls.",
    dtypes=("float32",),
    share=0.17,
    families=("llama", "gpt2", "bert", "vit"),
    alone=True,
    costly=True,
)
def compiles(case: Case) -> None:
    model = acting(case)
    batch = batch_for(model)

    def step(called: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = called(**batch).logits
        logits.square().mean().backward()
        return logits.detach(), gradients_of(model)

    wanted, learnt = step(model)
    with fresh_compiler():
        logits, compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    need(close(logits, wanted, CLOSE), f"compiled, the logits are {share(logits, wanted):.1e} off")
    same_gradients(compiled, learnt, "compiled")
