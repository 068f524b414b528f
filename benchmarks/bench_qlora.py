"""QLoRA beside LoRA: the demo's task over the base in 32 bits and in 4, and what training takes of memory.

On the demo's task (docstrings of Python's library, told apart by package): the head fitted to the frozen base
first, then a hundred steps of LoRA of rank 8 on every linear layer, over MiniLM as it comes and over the same
in NF4 with double quantisation. Memory: two steps of a decoder with random weights, each in a process of
its own, its peak above what the process held before the model came.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import inlay
from inlay_train import base, demo, demo_run, encoder, learning
from inlay_train.data import PACKAGES
from inlay_train.encoder import accuracy, logits
from inlay_train.quantised import FewBits, prepare_quantised

BASES = ("float32", "nf4")
WITHIN = 0.01
DECODER = {"vocab_size": 8000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
           "num_attention_heads": 12, "max_position_embeddings": 256}  # fmt: skip
# base, gradient checkpointing, optimizer
MEMORY = (
    ("float32", False, "AdamW"),
    ("nf4", False, "AdamW"),
    ("nf4", True, "AdamW"),
    ("nf4", True, "AdamW8bit"),
)


def learnt(kind: str, seed: int) -> dict[str, Any]:
    """Train the demo's LoRA over one base, from the head fitted to that base on."""
    learn, held = demo_run.texts(demo.Recipe().most, False)
    few = FewBits(4, double=True, compute="float32").configuration(["classifier"])
    more = {"quantization_config": few} if kind == "nf4" else {}
    torch.manual_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        encoder.folder(), num_labels=len(PACKAGES), local_files_only=True, **more
    ).eval()
    features = [x.through(lambda **batch: model.base_model(**batch).pooler_output) for x in (learn, held)]
    head = learning.head_only(features[0], learn.labels, len(PACKAGES), demo.Recipe().decay)
    model.classifier.load_state_dict(head.state_dict())
    said = str(prepare_quantised(model, checkpointing=False)) if kind == "nf4" else ""
    inlay.attach(model, demo.LORA, train=("head",), seed=seed)
    took, start = [], time.perf_counter()

    def step(loss: float) -> None:
        nonlocal start
        took.append(time.perf_counter() - start)
        start = time.perf_counter()

    learning.train(model, learn, steps=demo.Recipe().steps, batch=demo.Recipe().batch, seed=seed, step=step)
    alone = accuracy(head(features[1]), held)
    return {"base": kind, "seed": seed, "head alone": alone, "accuracy": accuracy(logits(model, held), held),
            "step": statistics.median(took), "held out": len(held), "said": said}  # fmt: skip


def taken(kind: str, checkpointing: bool, optimizer: str) -> dict[str, Any]:
    """Take two steps over a decoder of random weights; return the memory they took."""
    torch.manual_seed(0)
    ids = torch.randint(0, 8000, (2, 256))
    before = held_bytes()
    model: Any = decoder(kind)
    if kind != "float32":
        prepare_quantised(model, checkpointing=checkpointing)
    elif checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gc.collect()
    inlay.attach(model, "lora(rank=16, targets=['linear'])", seed=0)
    model.train()
    steps = optimizer_of(optimizer)(inlay.parameter_groups(model))
    weights = held_bytes() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    kept, took = 0, time.perf_counter()
    for _ in range(2):
        steps.zero_grad()
        loss, kept = with_activations(model, ids)
        loss.backward()
        steps.step()
    return {"base": kind, "checkpointing": checkpointing, "optimizer": optimizer, "process": weights,
            "activations": kept, "optimizer's": state_bytes(steps), "peak": held_bytes("VmHWM") - before,
            "step": (time.perf_counter() - took) / 2}  # fmt: skip


def decoder(kind: str) -> nn.Module:
    """Return the decoder in evaluation mode; in few bits a layer at a time, as loading does."""
    model = LlamaForCausalLM(LlamaConfig(**DECODER))
    if kind == "float32":
        return model
    from bitsandbytes import nn as bnb

    double = kind == "nf4"
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            made = bnb.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32,
                compress_statistics=double, quant_type="nf4", device="meta",
            )  # fmt: skip
            made.weight = bnb.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double
            )
            setattr(model.get_submodule(parent), leaf, made.to("cpu"))
            layer.weight = None
    return model


def optimizer_of(name: str) -> Any:
    import bitsandbytes

    return torch.optim.AdamW if name == "AdamW" else getattr(bitsandbytes.optim, name)


def with_activations(model: nn.Module, ids: Tensor) -> tuple[Tensor, int]:
    """Return the loss, and the bytes that its graph keeps for backward beside the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    return loss, sum(size for pointer, size in kept.items() if pointer not in own)


def state_bytes(optimizer: Any) -> int:
    return sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))


def held_bytes(which: str = "VmRSS") -> int:
    """Return what the process holds of memory now, or, as VmHWM, held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def in_process(work: Path, *arguments: Any) -> dict[str, Any]:
    """Return one measurement, made in a process of its own unless the work folder holds it already."""
    file = work / ("-".join(str(a) for a in arguments).replace(" ", "_") + ".json")
    if not file.exists():
        whole = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
        command = [sys.executable, __file__, "--one", json.dumps(arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=whole)
        file.write_text(done.stdout.splitlines()[-1])
    return dict(json.loads(file.read_bytes()))


def written(runs: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]]) -> str:
    """Return the page."""
    by_seed = {(r["base"], r["seed"]): r for r in runs}
    seeds = sorted({seed for _, seed in by_seed})
    means = {b: statistics.mean(by_seed[b, s]["accuracy"] for s in seeds) for b in BASES}
    lines = ["# QLoRA beside LoRA", "", (__doc__ or "").partition("\n\n")[2].strip(), ""]
    lines += ["| base | head alone | " + " | ".join(f"seed {s}" for s in seeds) + " | mean | step |",
              "|---|---|" + "---|" * (len(seeds) + 2)]  # fmt: skip
    for b in BASES:
        rows = [by_seed[b, s] for s in seeds]
        step = statistics.median(r["step"] for r in rows)
        lines.append(
            f"| {b} | {rows[0]['head alone']:.1%} | "
            + " | ".join(f"{r['accuracy']:.1%}" for r in rows)
            + f" | {means[b]:.1%} | {step:.1f} s |"
        )
    gap = 100 * (means["nf4"] - means["float32"])
    held = f"{WITHIN:.0%} held" if gap >= -100 * WITHIN else f"{WITHIN:.0%} not held"
    lines += ["", f"NF4 is {gap:+.1f} points from float32 on {runs[0]['held out']} texts: {held}.", ""]
    lines += ["| base | checkpointing | optimizer | model and adapter | kept for backward | its state "
              "| peak | step |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in memory:
        sizes = (f"{r[name] / 1e6:.0f} MB" for name in ("process", "activations", "optimizer's", "peak"))
        lines.append(
            f"| {r['base']} | {'on' if r['checkpointing'] else 'off'} | {r['optimizer']} | "
            + " | ".join(sizes)
            + f" | {r['step']:.1f} s |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("bench-qlora"), help="where measurements are kept")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    base.quiet()
    if given.one:
        what, *arguments = given.one
        print(json.dumps({"learnt": learnt, "taken": taken}[what](*arguments)))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    memory = [in_process(given.work, "taken", *row) for row in MEMORY]
    runs = [in_process(given.work, "learnt", b, seed) for seed in range(given.seeds) for b in BASES]
    page = written(runs, memory)
    print(page)
    (RESULTS / "qlora.md").write_text(page)
    content = {"benchmark": "qlora", "machine": machine(), "decoder": DECODER, "rows": runs, "memory": memory}
    (RESULTS / "qlora.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
