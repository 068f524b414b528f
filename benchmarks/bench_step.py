"""A training step of each method over the limit, beside peft's of the same method, interleaved.

The limit: forward of the frozen base, and backward of activations down to the embedding, with no adapter.
Ratios are of medians over interleaved rounds on a small Llama in float32, on one thread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import report
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import inlay

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 'targets=["linear"]'
# Our stack, and peft's configuration: class and settings.
PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": (f"lora(rank=8, {LAYERS})", "LoraConfig", {"r": 8}),
    "dora": (f"dora(rank=8, {LAYERS})", "LoraConfig", {"r": 8, "use_dora": True}),
    "pissa": (f"lora(rank=8, {LAYERS}, start=pissa())", "LoraConfig",
              {"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"}),
    "vera": (f"vera(rank=256, {LAYERS})", "VeraConfig", {"r": 256}),
    "loha": (f"loha(rank=8, {LAYERS})", "LoHaConfig", {"r": 8}),
    "lokr": (f"lokr(rank=8, {LAYERS})", "LoKrConfig", {"r": 8}),
    "fourierft": (f"fourierft(n_frequency=1000, {LAYERS})", "FourierFTConfig", {"n_frequency": 1000}),
    "waveft": (f"waveft(n_frequency=1000, {LAYERS})", "WaveFTConfig", {"n_frequency": 1000}),
    "randlora": (f"randlora(rank=32, {LAYERS})", "RandLoraConfig", {"r": 32}),
    "vblora": (f"vblora(rank=4, vector_length=128, {LAYERS})", "VBLoRAConfig",
               {"r": 4, "vector_length": 128, "num_vectors": 256}),
    "c3a": (f"c3a(block_size=128, {LAYERS})", "C3AConfig", {"block_size": 128}),
    "miss": (f"miss(rank=64, {LAYERS})", "MissConfig", {"r": 64}),
    "delora": (f"delora(rank=8, {LAYERS})", "DeloraConfig", {"r": 8}),
    "gralora": (f"gralora(rank=32, {LAYERS})", "GraloraConfig", {"r": 32}),
    "oft": (f"oft(block_size=32, {LAYERS})", "OFTConfig", {"oft_block_size": 32}),
    "boft": (f"boft(block_size=4, {LAYERS})", "BOFTConfig", {"boft_block_size": 4}),
    "hra": (f"hra(rank=8, {LAYERS})", "HRAConfig", {"r": 8}),
    "road": (f"road({LAYERS})", "RoadConfig", {}),
}  # fmt: skip


def base(hidden: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).train()


def limit(model: nn.Module) -> nn.Module:
    """Return a copy whose backward goes down to the embedding's output, for nothing that learns."""
    model = copy.deepcopy(model)
    model.get_input_embeddings().register_forward_hook(lambda m, a, y: y.requires_grad_())  # type: ignore[operator]
    return model


def theirs(model: nn.Module, kind: str, settings: dict[str, Any]) -> nn.Module:
    import peft

    config = getattr(peft, kind)(target_modules=list(TARGETS), **settings)
    return peft.get_peft_model(copy.deepcopy(model), config).train()  # type: ignore[arg-type]


def ours(model: nn.Module, stack: str) -> nn.Module:
    model = copy.deepcopy(model)
    inlay.attach(model, stack, seed=0)
    return model.train()


def step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-6) if learning else None

    def run() -> None:
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Return the bytes of distinct storages that autograd keeps of one forward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held.append(model(**batch).loss)
    return sum(kept.values())


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return each run's median seconds, over rounds in which all of them take a turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs="*", help="these methods alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, ids = base(given.hidden, given.layers), torch.randint(0, 1000, (4, 128))
    batch, bare = {"input_ids": ids, "labels": ids}, limit(base(given.hidden, given.layers))
    rows = []
    for name, (stack, kind, settings) in PAIRS.items():
        if given.only and name not in given.only:
            continue
        pair = {"limit": bare, "ours": ours(model, stack), "theirs": theirs(model, kind, settings)}
        took = interleaved({n: step(m, batch) for n, m in pair.items()}, given.rounds)
        saved = {n: saved_bytes(m, batch) for n, m in pair.items()}
        rows.append({
            "method": name,
            "over the limit": took["ours"] / took["limit"],
            "peft": took["theirs"] / took["limit"],
            "saved activations": saved["ours"] / saved["limit"],
            "peft's": saved["theirs"] / saved["limit"],
        })  # fmt: skip
        print(rows[-1], flush=True)
    report("step", rows)


if __name__ == "__main__":
    main()
