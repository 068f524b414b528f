"""Reparameterisations in huggingface/peft and here: what each is called, and how its tensors are renamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from layer_methods import LINEAR, own, theirs
from torch import Tensor, nn

import inlay
from inlay.stack import need_state
from inlay.testing.layers import deltas_of, settled

# Of peft's, MiSS and DeLoRA know no Conv1D.
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "value", "output.dense"],
}


@dataclass(frozen=True)
class Pair:
    """A method of both libraries: its configuration there, its stack here, its tensors' names here.

    `shared` are those that all layers share, by the names of peft's and of ours.
    """

    config: Callable[..., Any]
    settings: dict[str, Any]
    stack: str
    names: dict[str, str]
    shared: dict[str, str] = field(default_factory=dict)
    families: tuple[str, ...] = ("llama", "gpt2", "bert")


PAIRS: dict[str, Pair] = {
    "vera": Pair(
        peft.VeraConfig, {"r": 5, "projection_prng_key": 3}, "vera(rank=5, key=3, targets={targets})",
        {"vera_lambda_d": "lambda_d", "vera_lambda_b": "lambda_b"},
    ),
    "miss": Pair(
        peft.MissConfig, {"r": 5}, "miss(rank=5, targets={targets})", {"miss_block": "block"},
        families=("llama", "bert"),
    ),
    "miss mini": Pair(
        peft.MissConfig, {"r": 4, "init_weights": "mini", "mini_r": 8},
        "miss(rank=4, mode='mini', mini_rank=8, targets={targets})", {"miss_block": "block"},
        families=("llama", "bert"),
    ),
    "miss bat": Pair(
        peft.MissConfig, {"r": 8, "init_weights": "bat"}, "miss(rank=8, mode='bat', targets={targets})",
        {"miss_block": "block"}, families=("llama", "bert"),
    ),
    "delora": Pair(
        peft.DeloraConfig, {"r": 4, "delora_lambda": 2.0},
        "delora(rank=4, strength=2, start='zero', targets={targets})",
        {"delora_A": "down", "delora_B": "up", "delora_lambda": "strength"}, families=("llama", "bert"),
    ),
    "fourierft": Pair(
        peft.FourierFTConfig, {"n_frequency": 40, "scaling": 30.0, "random_loc_seed": 11},
        "fourierft(n_frequency=40, scaling=30, seed=11, targets={targets})",
        {"fourierft_spectrum": "spectrum"},
    ),
    "few frequencies": Pair(
        peft.FourierFTConfig, {"n_frequency": 2, "scaling": 300.0},
        "fourierft(n_frequency=2, scaling=300, targets={targets})", {"fourierft_spectrum": "spectrum"},
    ),
    "waveft": Pair(
        peft.WaveFTConfig, {"n_frequency": 60, "random_loc_seed": 11},
        "waveft(n_frequency=60, seed=11, targets={targets})", {"waveft_spectrum": "spectrum"},
    ),
    "waveft db4": Pair(
        peft.WaveFTConfig, {"n_frequency": 4, "wavelet_family": "db4", "scaling": 60.0},
        "waveft(n_frequency=4, wavelet='db4', scaling=60, targets={targets})",
        {"waveft_spectrum": "spectrum"},
    ),
    "waveft plain": Pair(
        peft.WaveFTConfig, {"n_frequency": 30, "use_idwt": False},
        "waveft(n_frequency=30, use_idwt=False, targets={targets})", {"waveft_spectrum": "spectrum"},
    ),
    "randlora": Pair(
        peft.RandLoraConfig, {"r": 5, "randlora_alpha": 4},
        "randlora(rank=5, alpha=4, save_projection=True, targets={targets})",
        {"randlora_lambda": "scales", "randlora_gamma": "gains"},
        {"randlora_A": "shared.common.A", "randlora_B": "shared.common.B"},
    ),
    "vblora": Pair(
        peft.VBLoRAConfig, {"r": 3, "num_vectors": 6, "vector_length": 8},
        "vblora(rank=3, num_vectors=6, vector_length=8, targets={targets})",
        {"vblora_logits_A": "down.logits", "vblora_logits_B": "up.logits"},
        {"vblora_vector_bank": "shared.common.bank"},
    ),
}  # fmt: skip


def pair(name: str, family: str) -> tuple[nn.Module, nn.Module]:
    """Return the model of both libraries, every tensor of ours a copy of peft's."""
    chosen, targets = PAIRS[name], TARGETS[family]
    extra = {"fan_in_fan_out": family == "gpt2"} if "fan_in_fan_out" in vars(chosen.config()) else {}
    other = theirs(family, chosen.config(target_modules=targets, **chosen.settings, **extra))
    model = settled(family)
    inlay.attach(model, chosen.stack.format(targets=targets))
    (placed,) = need_state(model).placed.values()
    tensors, left = placed.adapter.tensors(), set(placed.adapter.tensors())
    for found, here in sorted(renamed(chosen, other).items()):
        with torch.no_grad():
            tensors[found].copy_(here.detach().view(tensors[found].shape))
        left.remove(found)
    assert all(n.endswith(".norms") for n in left), left
    return other, model


def renamed(chosen: Pair, other: nn.Module) -> dict[str, Tensor]:
    """Return peft's tensors under the local names that ours have."""
    found: dict[str, Tensor] = {}
    for name, tensor in own(other).items():
        path, _, leaf = name.rpartition(".")
        if leaf in chosen.names:
            found[f"{path}.{chosen.names[leaf]}"] = tensor
    for leaf, here in chosen.shared.items():
        found[here] = getattr(other.base_model, leaf)["default"]  # type: ignore[index]
    return found


def gradients(chosen: Pair, other: nn.Module, model: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Return (name, our gradient, peft's) of every tensor that learns."""
    deltas = deltas_of(model)
    return [
        (name, deltas[path].get_parameter(leaf).grad, tensor.grad)  # type: ignore[misc]
        for name, tensor in renamed(chosen, other).items()
        if tensor.grad is not None and not name.startswith("shared.")
        for path, leaf in [_split(name, deltas)]
    ]


def _split(name: str, deltas: Any) -> tuple[str, str]:
    path = next(p for p in deltas if name.startswith(f"{p}."))
    return path, name.removeprefix(f"{path}.")


__all__ = ["LINEAR", "PAIRS", "Pair", "gradients", "pair", "renamed"]
