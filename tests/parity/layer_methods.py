"""The same adapter in huggingface/peft and here: one model each, the same weights in both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn

import inlay
from inlay.testing.layers import deltas_of, settled
from inlay.testing.models import batch_for
from inlay.testing.tools import distance

FAMILIES = ("llama", "gpt2", "bert", "t5", "vit")
# Every linear layer of a block, as both libraries match names: by their last components.
LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
}
TOLERANCE = 1e-5  # of the largest logit, gradient or weight compared


def theirs(family: str, config: Any, *, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a model adapted by peft, every tensor of the adapter moved away from where it starts."""
    model = peft.get_peft_model(settled(family, **changes), config).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(own(model).items()):
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 0.1 if "magnitude" in name or "ia3" in name else 0.5 / parameter.shape[-1] ** 0.5
            parameter.add_(noise * spread)
    return model


def own(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors of peft's adapter, by module path and tensor name; its copy of a head is no part."""
    learning = ((n, p) for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n)
    return {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in learning}


def ours(family: str, stack: str, tensors: Mapping[str, Tensor], **changes: Any) -> nn.Module:
    """Return the same model adapted here; `tensors` are the adapter's, by "<site>.<tensor>", all of them."""
    model = settled(family, **changes)
    inlay.attach(model, stack)
    deltas = deltas_of(model)
    left = {f"{site}.{n}": p for site, d in deltas.items() for n, p in d.named_parameters()}
    assert left.keys() == tensors.keys()
    with torch.no_grad():
        for name, parameter in left.items():
            parameter.copy_(tensors[name].detach().view(parameter.shape))
    return model


def batch_of(family: str) -> dict[str, Any]:
    """Return a batch with labels, padded on the right where the family takes a mask."""
    batch = batch_for(settled(family), labels=True)
    if "input_ids" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 5:] = 0
    return batch


def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    mask = batch.get("attention_mask")
    return found[mask.bool()] if mask is not None and found.dim() == 3 and "labels" in batch else found


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether no entry differs by more than the tolerance of the largest."""
    return float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max())


def acts(family: str, model: nn.Module, **changes: Any) -> bool:
    """Return whether the adapter changes what the model does by more than rounding ever could."""
    batch = batch_of(family)
    return distance(logits(model, batch), logits(settled(family, **changes), batch)) > 0.02
