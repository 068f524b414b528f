"""What is found is what it is called: every found layer of a tiny, running model is adapted and measured."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import survey
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import inlay
from inlay import InlayError
from inlay.anatomy import Anatomy
from inlay.stack import state_of

ROLES = ("query", "key", "value", "output", "gate", "up", "down")
SMALL = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "dim",
                     "embedding_size", "emb_dim", "word_embed_proj_dim"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner",
                     "n_inner", "ffn_hidden_size"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 24),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads", "attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_head_kv"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 8),
    "vocab_size": 120, "n_ctx": 64, "image_size": 32, "patch_size": 8,
}  # fmt: skip
LAYERS = 4  # hybrids need as many to show all their kinds; others are cut to two
MOST = 30_000_000  # parameters a model may have here


@dataclass
class Proof:
    """What one model class showed: why it could not run, or what went wrong with what was found."""

    kind: str
    type: str
    unrun: str = ""
    wrong: list[str] = field(default_factory=list)
    sites: int = 0
    error: float = 0.0  # of the merged model's output, as a share of the adapter's effect


def shrink(config: Any, depth: int = 0) -> None:
    """Make a configuration, and those inside it, tiny; what refuses stays as it is."""
    for name, small in SMALL.items():
        with suppress(Exception):
            value = getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > small:
                setattr(config, name, small)
    for name, value in list(vars(config).items()):
        if name.endswith("_token_id") and isinstance(value, int) and value >= SMALL["vocab_size"]:
            setattr(config, name, 3)
        if hasattr(value, "to_dict") and depth < 3:
            shrink(value, depth + 1)
    with suppress(Exception):
        config.use_cache = False


def built(kind: str, model_type: str) -> Any:
    config = CONFIG_MAPPING[model_type](**survey.HYBRIDS.get(model_type, {}))
    survey.shrink(config, most=LAYERS)
    shrink(config)
    if getattr(config, "pad_token_id", None) is None:
        with suppress(Exception):
            config.pad_token_id = 0
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def inputs(model: Any, task: str) -> dict[str, Any]:
    """Return a batch of two for a model of the task."""
    if task == "image classification":
        size = getattr(model.config, "image_size", 32)
        size = size if isinstance(size, int) else size[0]
        return {"pixel_values": torch.randn(2, getattr(model.config, "num_channels", 3) or 3, size, size)}
    ids = torch.randint(4, 100, (2, 8))
    end = getattr(model.config, "eos_token_id", None)
    ids[:, -1] = end if isinstance(end, int) else ids[:, -1]
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :6]} if task == "sequence to sequence" else {})}


def prove(kind: str, model_type: str, task: str) -> Proof:
    """Build a model, adapt all it has of the roles at once, and look at effect, gradients, merge, detach."""
    proof = Proof(kind, model_type)
    try:
        model = built(kind, model_type)
        if sum(p.numel() for p in model.parameters()) > MOST:
            raise ValueError("too large for this test")
        batch = inputs(model, task)
        base = logits(model, batch)
        if not bool(base.isfinite().all()) or not torch.equal(base, logits(model, batch)):
            raise ValueError("its output is not finite, or not twice the same")
        if base.norm() < 1e-20:
            raise ValueError("its output vanishes when so small")
    except Exception as error:  # transformers raises whatever its files provoke
        proof.unrun = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:80]}"
        return proof
    found = {site.role for site in Anatomy(model).leaves if site.layer is not None}
    roles = [f"both.{role}" for role in ROLES if role in found]
    if roles:
        _adapted(proof, model, batch, base, roles)
    return proof


def _adapted(proof: Proof, model: nn.Module, batch: dict[str, Any], base: Tensor, roles: list[str]) -> None:
    moving = _moving(model, batch)
    try:
        plan = inlay.attach(model, f"lora(rank=2, targets={roles!r})", seed=0)
        proof.sites = sum(len(part.sites) for part in plan.parts)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".inlay." in name:
                    parameter.normal_(std=0.05)
        adapted = logits(model, batch)
        effect = (adapted - base).norm()
        if not effect > 1e-5 * base.norm():
            proof.wrong.append("no effect")
        proof.wrong += _idle(model, batch, moving)
        inlay.merge(model)
        proof.error = float((logits(model, batch) - adapted).norm() / effect)
        inlay.detach(model)
        if not torch.equal(logits(model, batch), base):
            proof.wrong.append("not what it was after detach")
    except InlayError as error:
        proof.wrong.append(f"{type(error).__name__}: {error}".replace("\n", " "))


def _idle(model: Any, batch: dict[str, Any], moving: set[str]) -> list[str]:
    """Return the sites whose adapter gets no gradient though the weight there got one before."""
    model(**batch).logits.float().square().mean().backward()
    state = state_of(model)
    assert state is not None
    return [
        f"no gradient: {site.name}"
        for placed in state.placed.values()
        for site, delta in placed.adapter.placed
        if site.name in moving
        and "expert" not in site.name  # which tokens go to which may change
        and any(p.grad is None or not p.grad.any() for p in delta.parameters())
    ]


def _moving(model: Any, batch: dict[str, Any]) -> set[str]:
    """Return the sites of a bare model whose weight gets a gradient: towers without input do not run."""
    model(**batch).logits.float().square().mean().backward()
    grads = [(s, getattr(s.tensor(s.weight_name), "grad", None)) for s in Anatomy(model).leaves]
    moving = {site.name for site, grad in grads if grad is not None and bool(site.cut(grad).any())}
    model.zero_grad()
    return moving


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch).logits.float()
    return result


if __name__ == "__main__":
    for number, (kind, (model_type, task)) in enumerate(survey.kinds().items()):
        if number % int(sys.argv[2]) == int(sys.argv[1]):
            proof = prove(kind, model_type, task)
            print(kind, proof.sites, f"{proof.error:.1e}", proof.unrun, proof.wrong[:3], flush=True)
