"""The same adapters in peft and here, for going from one to the other and back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from inlay.testing.layers import settled
from inlay.testing.models import batch_for

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}
FAMILIES = tuple(TASKS)
ATTENTION = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"]}
LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}


@dataclass(frozen=True)
class Twin:
    """One method in both libraries: peft's configuration, the method's settings here, families it is for."""

    theirs: Any
    here: str
    families: tuple[str, ...] = FAMILIES

    def config(self, family: str) -> Any:
        return self.theirs(family)

    def stack(self, family: str) -> str:
        return self.here.replace("TARGETS", repr(LINEAR[family]))


def over(kind: str, **settings: Any) -> Any:
    """Return how to make a configuration of peft's over every linear layer of a family."""

    def made(family: str) -> Any:
        head = {"modules_to_save": ["classifier"]} if family == "bert" else {}
        return getattr(peft, kind)(task_type=TASKS[family], target_modules=LINEAR[family], **head, **settings)

    return made


UNTURNED = ("llama", "bert")  # peft's OFT, BOFT, HRA, RoAd take no Conv1D
RANKS: dict[str, Any] = {
    "rank_pattern": {"(layers?|h).0.*": 2}, "alpha_pattern": {"(query|q_proj|c_attn)": 3},
}  # fmt: skip
TWINS = {
    "lora": Twin(over("LoraConfig", r=4, lora_alpha=6), "lora(rank=4, alpha=6, targets=TARGETS)"),
    "rslora": Twin(
        over("LoraConfig", r=4, lora_alpha=6, use_rslora=True, **RANKS),
        "lora(rank=4, alpha=6, scaling='rsqrt', targets=TARGETS)",
    ),
    "dora": Twin(over("LoraConfig", r=4, use_dora=True), "dora(rank=4, targets=TARGETS)"),
    "oft": Twin(
        over("OFTConfig", r=0, oft_block_size=8), "oft(block_size=8, terms=6, targets=TARGETS)", UNTURNED
    ),
    "oft-exact": Twin(
        over("OFTConfig", r=0, oft_block_size=8, use_cayley_neumann=False, block_share=True),
        "oft(block_size=8, cayley='exact', shared=True, targets=TARGETS)",
        UNTURNED,
    ),
    "boft": Twin(over("BOFTConfig", boft_block_size=4), "boft(targets=TARGETS)", UNTURNED),
    "hra": Twin(over("HRAConfig", r=4), "hra(rank=4, targets=TARGETS)", UNTURNED),
    "road": Twin(
        over("RoadConfig", variant="road_4", group_size=8),
        "road(variant='road_4', group_size=8, targets=TARGETS)",
        UNTURNED,
    ),
    "loha": Twin(over("LoHaConfig", r=4, alpha=6), "loha(rank=4, alpha=6, targets=TARGETS)", UNTURNED),
    "lokr": Twin(over("LoKrConfig", r=2, alpha=6), "lokr(rank=2, alpha=6, targets=TARGETS)", UNTURNED),
    "lokr-both": Twin(
        over("LoKrConfig", r=1, decompose_both=True, decompose_factor=4),
        "lokr(rank=1, decompose_both=True, decompose_factor=4, targets=TARGETS)",
        UNTURNED,
    ),
    "fourierft": Twin(
        over("FourierFTConfig", n_frequency=40, random_loc_seed=3),
        "fourierft(n_frequency=40, seed=3, targets=TARGETS)",
    ),
    "waveft": Twin(over("WaveFTConfig", n_frequency=40), "waveft(n_frequency=40, targets=TARGETS)"),
    "c3a": Twin(over("C3AConfig", block_size=8), "c3a(block_size=8, targets=TARGETS)", UNTURNED),
    "gralora": Twin(
        over("GraloraConfig", r=4, alpha=6, hybrid_r=2),
        "gralora(rank=4, alpha=6, hybrid_rank=2, targets=TARGETS)",
    ),
    "miss": Twin(over("MissConfig", r=6), "miss(rank=6, targets=TARGETS)", UNTURNED),
    "miss-bat": Twin(
        over("MissConfig", r=8, init_weights="bat"), "miss(rank=8, mode='bat', targets=TARGETS)", UNTURNED
    ),
    "vera": Twin(over("VeraConfig", r=5, projection_prng_key=3), "vera(rank=5, key=3, targets=TARGETS)"),
    "randlora": Twin(
        over("RandLoraConfig", r=5, randlora_alpha=4), "randlora(rank=5, alpha=4, targets=TARGETS)"
    ),
    "vblora": Twin(
        over("VBLoRAConfig", r=3, num_vectors=6, vector_length=8),
        "vblora(rank=3, num_vectors=6, vector_length=8, targets=TARGETS)",
    ),
    "delora": Twin(
        over("DeloraConfig", r=4, delora_lambda=2.0),
        "delora(rank=4, strength=2, start='zero', targets=TARGETS)",
        UNTURNED,
    ),
    "lora-bias": Twin(
        over("LoraConfig", r=4, lora_bias=True), "lora(rank=4, bias='own', targets=TARGETS)", ("gpt2", "bert")
    ),
    "ia3": Twin(
        lambda family: peft.IA3Config(
            task_type=TASKS[family],
            target_modules=IA3[family][0] + IA3[family][1],
            feedforward_modules=IA3[family][1],
        ),
        "ia3()",
    ),
}
IA3 = {
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
    "bert": (["key", "value"], [r"layer.0.output.dense", "layer.1.output.dense"]),
}


def moved(model: Any, *, seed: int = 0) -> Any:
    """Move every tensor that learns away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                width = (
                    10.0 if re.search("magnitude|ia3|road|boft_s", name) else parameter.shape[-1] ** 0.5 * 2
                )
                parameter.add_(torch.randn(parameter.shape, generator=generator) / width)
    return model.eval()


def saved_by_peft(family: str, twin: Twin, folder: Path) -> Tensor:
    """Save an adapter trained (moved) in peft; return its logits."""
    model = moved(peft.get_peft_model(settled(family), twin.config(family)))
    model.save_pretrained(str(folder))
    return logits(model)


def loaded_by_peft(family: str, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(settled(family), str(folder)).eval()


def logits(model: nn.Module) -> Tensor:
    plain = settled("bert")
    with torch.no_grad():
        found: Tensor = model(**batch_for(plain)).logits
    return found


def far(a: Tensor, b: Tensor) -> float:
    """Return the largest difference as a share of the largest entry."""
    return float((a - b).abs().max() / b.abs().max())
