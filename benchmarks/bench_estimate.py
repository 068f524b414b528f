"""`inlay estimate` held against real training steps on the CPU, each in a process of its own.

The estimate is counted on shapes alone; the measurement is the peak of torch's allocator in the second step
of inlay's Trainer (measuring.py). With a part of the runs' names as argument only those run, and nothing is
written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, machine, report
from transformers import BertConfig, LlamaConfig, T5Config

from inlay_train.estimate.request import Request
from inlay_train.estimate.result import estimate

STACK = "lora(rank=8) + prefix_tuning(length=16, hidden=64) + serial_adapter(rank=16)"
LORA = "lora(rank=8)"
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=4000, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, architectures=["LlamaForCausalLM"],
    ),
    "bert": BertConfig(
        vocab_size=4000, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        architectures=["BertForSequenceClassification"],
    ),
    "t5": T5Config(
        vocab_size=4000, d_model=256, d_kv=32, d_ff=1024, num_layers=3, num_heads=8,
        decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"],
    ),
}  # fmt: skip
HALF = {"dtype": "bfloat16", "batch": 2, "length": 64}
AGAIN = {"checkpointing": True}
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", LORA, {}),
    ("llama", LORA, AGAIN),
    ("llama", LORA, {"padded": True}),
    ("llama", LORA, {"accumulate": 2}),
    ("llama", LORA, HALF),
    ("llama", LORA, HALF | AGAIN),
    ("llama", LORA, {"quantize": "nf4"}),
    ("llama", LORA, AGAIN | {"quantize": "nf4"}),
    ("llama", LORA, HALF | {"quantize": "nf4"}),
    ("llama", LORA, {"quantize": "int8"}),
    ("llama", "lora(rank=64)", {"optimizer": "adamw_8bit"}),
    ("llama", STACK, {}),
    ("llama", STACK, AGAIN),
    ("llama", STACK, HALF),
    ("llama", "head", {}),
    ("llama", "full", {}),
    ("llama", "full", {"batch": 1, "length": 16}),
    ("llama", "full", {"batch": 1, "length": 16, "optimizer": "sgd"}),
    ("llama", "full", {"batch": 1, "length": 16, "optimizer": "adamw_8bit"}),
    ("llama", "full", {"batch": 1, "length": 16, "accumulate": 2}),
    ("llama", "full", HALF),
    ("bert", LORA, {}),
    ("bert", LORA, AGAIN),
    ("bert", LORA, {"padded": True}),
    ("bert", STACK, {}),
    ("bert", STACK, HALF),
    ("bert", "head", {}),
    ("bert", "full", {"optimizer": "sgd"}),
    ("bert", "full", AGAIN),
    ("t5", LORA, {}),
    ("t5", LORA, AGAIN),
    ("t5", LORA, {"padded": True}),
    ("t5", STACK, {}),
    ("t5", "full", {}),
    ("t5", "full", {"optimizer": "sgd", "target_length": 32}),
]


def measured(request: Request) -> int:
    """Return the peak of a real step, in bytes, of a process of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "measuring.py"), json.dumps(asdict(request))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def row(model: str, method: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    MODELS[model].save_pretrained(folder / model)
    request = Request(str(folder / model), method, **{"batch": 4, "length": 128, **settings})
    guess, real = estimate(request).total, measured(request)
    said = {"mebibytes estimated": guess / 2**20, "measured": real / 2**20, "ratio": guess / real}
    return {"model": model, "method": method, "settings": told(request), **said}


def told(request: Request) -> str:
    flags = [name for name in ("checkpointing", "padded") if getattr(request, name)]
    others = [f"{n}={getattr(request, n)}" for n in ("quantize", "target_length") if getattr(request, n)]
    others += [f"accumulate={request.accumulate}"] if request.accumulate > 1 else []
    return ", ".join([f"{request.batch}×{request.length}", request.dtype, request.optimizer, *others, *flags])


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write results/estimate.md."""
    head = [*rows[0]]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for entry in rows:
        cells = [
            f"{v:.3f}" if k == "ratio" else f"{v:.1f}" if isinstance(v, float) else v
            for k, v in entry.items()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    about = f"Peak of torch's allocator in a training step on the CPU; torch {machine()['torch']}."
    (RESULTS / "estimate.md").write_text("\n".join(["# Estimated and measured", "", about, "", *lines, ""]))


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model, method, settings in RUNS:
            if wanted in f"{model} {method} {settings}":
                rows.append(row(model, method, settings, Path(folder)))
                print(json.dumps(rows[-1]), flush=True)
    if not wanted:
        report("estimate", rows)
        write_table(rows)


if __name__ == "__main__":
    main()
