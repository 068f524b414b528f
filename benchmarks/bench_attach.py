"""How long attach, detach and load take: LoRA on 168 linear layers, and what is left afterwards.

Goals: attach ≤ 0.15 s, detach ≤ 0.05 s; a detached or finally merged model has its original classes
and no hook. Judged by the clock; "processor" is the thread's own time, for a busy machine. The model is
a Llama of 24 blocks with 7 linear layers each.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import report, seconds, spread
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay_lora import LoRA

ROUNDS = 9
GOALS = {"attach": 0.15, "detach": 0.05}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
METHOD = LoRA(rank=8, targets=["linear"])


def llama() -> nn.Module:
    sizes = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8)).eval()


def traces(model: nn.Module) -> dict[str, Any]:
    """Return what an adapter could leave behind: classes, hooks, attributes, children."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            sorted(module._modules),
            [len(vars(module)[h]) for h in HOOKS],
        )
        for name, module in model.named_modules()
    }


def main() -> None:
    model = llama()
    before = traces(model)
    sites = len(inlay.plan(model, METHOD).parts[0].sites)
    cases = ("attach", "attach beside another", "load", "use", "detach one of two", "detach")
    times: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        inlay.attach(model, METHOD)
        inlay.save(model, Path(folder) / "saved")
        inlay.detach(model)
        for _ in range(ROUNDS):
            times["attach"].append(seconds(lambda: inlay.attach(model, METHOD, name="a")))
            times["attach beside another"].append(seconds(lambda: inlay.attach(model, METHOD, name="b")))
            times["detach one of two"].append(seconds(lambda: inlay.detach(model, "b")))
            times["load"].append(seconds(lambda: inlay.load(model, Path(folder) / "saved", name="c")))
            times["use"].append(seconds(lambda: inlay.use(model, "c")))
            times["detach"].append(seconds(lambda: inlay.detach(model)))
    clean = {"after detach": traces(model) == before}
    inlay.attach(model, METHOD)
    inlay.merge(model, undo=False)
    clean["after merge(undo=False)"] = traces(model) == before
    rows = [_row(f"{name}, {sites} layers", values, GOALS.get(name)) for name, values in times.items()]
    report("attach", rows, rounds=ROUNDS, threads=torch.get_num_threads(), original_classes_and_no_hook=clean)
    print("\noriginal classes, attributes, children, no hook:", clean)


def _row(what: str, values: list[tuple[float, float]], goal: float | None) -> dict[str, Any]:
    found, busy = spread([wall for wall, _ in values]), spread([cpu for _, cpu in values])
    limits = {} if goal is None else {"goal": goal, "kept": found["median"] <= goal}
    return {"what": what, "seconds": found["median"], "min": found["min"], "max": found["max"],
            "processor": busy["median"], "goal": "", "kept": "", **limits}  # fmt: skip


if __name__ == "__main__":
    main()
