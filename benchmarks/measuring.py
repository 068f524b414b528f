"""What a real training step takes: run as a process of its own by bench_estimate.py and by tests.

    python benchmarks/measuring.py '{"model": …, "method": …}'     the fields of inlay_train's Request

prints the peak of torch's allocator in bytes in the second step of inlay's Trainer, as JSON. The peak is
exact: torch's profiler records every allocation from before the model is made, those inside kernels too.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback, TrainingArguments, default_data_collator

import inlay
from inlay_train import base, loading
from inlay_train.adapted import heads
from inlay_train.estimate.request import DTYPES, Read, Request, read
from inlay_train.quantised import FewBits
from inlay_train.trainer import Trainer

OPTIMIZERS = {"adamw": "adamw_torch_fused", "sgd": "sgd", "adamw_8bit": "adamw_bnb_8bit"}
MARK = "second step"


def measured(request: Request) -> dict[str, Any]:
    """Train two steps; return the peak of the second, in bytes."""
    found = read(request)
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        trainer = _trainer(request, found, Path(folder))
        trainer.train()
    return {"peak": peak(seen)}


def peak(seen: Any) -> int:
    """Return the most bytes that torch's allocator held in the second step."""
    events = list(_walk(seen.profiler.kineto_results.experimental_event_tree()))
    (start,) = (e.start_time_ns for e in events if e.name == MARK)
    allocations = sorted(
        (e.start_time_ns, e.extra_fields.total_allocated) for e in events if e.tag.name == "Allocation"
    )
    before = [held for moment, held in allocations if moment < start]
    return max(before[-1], *(held for moment, held in allocations if moment >= start))


def _walk(events: Any) -> Any:
    for event in events:
        yield event
        yield from _walk(event.children)


class Marks(TrainerCallback):  # type: ignore[misc]
    """Puts a mark into the profile where the second step begins: then the optimizer has its state."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            with record_function(MARK):
                pass


def _trainer(request: Request, found: Read, folder: Path) -> Trainer:
    model = _model(request, found, folder)
    if found.stack is not None:
        inlay.attach(model, found.stack, "default", seed=0)
    rows = [_row(request, found, number) for number in range(request.batch * request.accumulate)]
    args = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=request.batch,
        gradient_accumulation_steps=request.accumulate, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, optim=OPTIMIZERS[request.optimizer], logging_strategy="no",
        activation_checkpointing=request.checkpointing, dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(
        model, args, adapter="default" if found.stack is not None else None, train_dataset=rows,
        data_collator=default_data_collator, callbacks=[Marks()],
    )  # fmt: skip


def _model(request: Request, found: Read, folder: Path) -> nn.Module:
    """Return the model with real weights; in few bits as `inlay train` loads it, or as its twin does."""
    dtype = DTYPES[request.dtype]
    torch.manual_seed(0)
    made: Any = found.kind._from_config(found.config, dtype=getattr(torch, dtype))
    if request.quantize is None:
        return made  # type: ignore[no-any-return]
    made.save_pretrained(folder)
    few = FewBits(8 if request.quantize == "int8" else 4, request.quantize == "nf4-double", dtype)
    skip = heads(base.skeleton(found.kind, found.config))
    loaded = loading.model(folder, found.kind, seed=0, settings={}, dtype=dtype, few_bits=few, heads=skip)
    for tensor in [*loaded.parameters(), *loaded.buffers()]:
        if not hasattr(tensor, "quant_state"):  # read from the file in place, which no allocator sees
            tensor.data = tensor.data.clone()
    return loaded


def _row(request: Request, found: Read, number: int) -> dict[str, Any]:
    ids = torch.randint(3, found.config.vocab_size, (request.length,), generator=_generator(number))
    mask = torch.ones_like(ids)
    if request.padded and number == 0:
        mask[-2:] = 0
    row: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    if found.task == "classification":
        row["labels"] = number % request.labels
    elif found.task == "seq2seq":
        row["labels"] = ids[: request.target_length or request.length]
    return row


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(measured(Request(**json.loads(sys.argv[1])))))
