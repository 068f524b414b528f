"""TRL reads `lm_head.weight` itself, past an adapter there; here log-probabilities come from the head."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import FusedCausalLMOutput


def is_adapted(model: Any) -> bool:
    """Return whether an adapter acts at the model's language head."""
    head = model.get_output_embeddings()
    return head is not None and "inlay" in dict(head.named_children())


def put_whole_head(model: Any) -> None:
    """Let `model(..., fused_lm_head=True)` run the whole model, its head and the adapters there."""
    own = types.MethodType(type(model).forward, model)

    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return own(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        count = kwargs.pop("num_items_in_batch", None)
        found = own(*args, **{**kwargs, "use_cache": False})
        logits = found.logits if shifted is not None else found.logits[:, :-1]
        return scores(logits, labels[:, 1:] if shifted is None else shifted, count, found.get("aux_loss"))

    model.forward = types.MethodType(forward, model)


def scores(
    logits: torch.Tensor, labels: torch.Tensor, count: Any = None, aux_loss: torch.Tensor | None = None
) -> FusedCausalLMOutput:
    """Return what TRL reads per token, (B, T): the labels' log-probabilities and more, 0 at label -100."""
    mask = labels != -100
    logits = logits.float()
    logs = logits.log_softmax(-1)

    def kept(values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(~mask, 0)

    log_probs = kept(logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0])
    with torch.no_grad():
        squares, top = (2 * logs).logsumexp(-1), logits.argmax(-1) == labels
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / (mask.sum().clamp(min=1) if count is None else count),
        log_probs=log_probs,
        entropy=kept(-(logs.exp() * logs).sum(-1)),
        log_sum_sq_probs=kept(squares),
        mean_logits=kept(logits.detach().mean(-1)),
        is_top1=kept(top),
        label_mask=mask,
        aux_loss=aux_loss,
    )
