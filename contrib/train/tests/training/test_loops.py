"""Any loop drives methods that act around a step: the same weights, bit for bit, and one draw for each step.

Plain PyTorch, accelerate's loop and the Trainer, each accumulating two batches for a step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay.stack import need_state
from inlay.testing.models import batch_for, build
from inlay_train import base
from inlay_train.trainer import Trainer

STEPS, ACCUMULATED = 6, 2
STACKS = {
    "adalora": "adalora(rank=4, target_rank=2, t_init=1, t_final=1)",
    "dylora": "dylora(rank=4)",
    "lora_plus": "lora_plus(rank=2)",
    "stack": "adalora(rank=4, target_rank=2, targets=['query']) + dylora(rank=4, targets=['value', 'up']) "
    "+ lora_plus(rank=2, targets=['key', 'value'])",
}  # fmt: skip
Seen = list[list[int]]  # the ranks each layer runs with, call by call
Loop = Callable[[nn.Module, list[dict[str, Tensor]], Path], None]


def adapted(stack: str) -> tuple[nn.Module, Seen]:
    """Return a model without dropout, and a list that fills with the ranks drawn."""
    model = build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inlay.attach(model, stack, "fr", seed=3)
    drawn = [
        d.drawn for p in need_state(model).placed.values() for _, d in p.adapter.placed if hasattr(d, "drawn")
    ]
    seen: Seen = []
    model.register_forward_pre_hook(lambda *_: seen.append([int(d.count_nonzero()) for d in drawn]))
    return model.train(), seen


def batches() -> list[dict[str, Tensor]]:
    model = build("bert")
    return [batch_for(model, rows=2, seed=n, labels=True) for n in range(STEPS * ACCUMULATED)]


def plain(model: nn.Module, data: list[dict[str, Tensor]], folder: Path) -> None:
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    inlay.lifecycle(model, optimizer, STEPS)
    for number, batch in enumerate(data, 1):
        ((model(**batch).loss + inlay.auxiliary_loss(model)) / ACCUMULATED).backward()
        if number % ACCUMULATED == 0:
            optimizer.step()
            optimizer.zero_grad()


def accelerated(model: nn.Module, data: list[dict[str, Tensor]], folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    groups = inlay.parameter_groups(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups))
    inlay.lifecycle(model, optimizer, STEPS)
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss + inlay.auxiliary_loss(model))
            optimizer.step()
            optimizer.zero_grad()


def trainer(model: nn.Module, data: list[dict[str, Tensor]], folder: Path) -> None:
    base.quiet()
    rows = [{name: tensor[row] for name, tensor in batch.items()} for batch in data for row in range(2)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, report_to="none",
        gradient_accumulation_steps=ACCUMULATED, use_cpu=True, max_grad_norm=0.0, save_strategy="no",
        lr_scheduler_type="constant", weight_decay=0.01, disable_tqdm=True,
        train_sampling_strategy="sequential",
        optim="adamw_torch",  # the one of the other loops: the fused one rounds otherwise
    )  # fmt: skip
    made = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    made.model_accepts_loss_kwargs = False  # BERT takes them and does not average by them
    made.train()


LOOPS: dict[str, Loop] = {"plain": plain, "accelerate": accelerated, "trainer": trainer}


@pytest.mark.parametrize("stack", STACKS)
def test_every_loop_gives_the_same_weights(stack: str, tmp_path: Path) -> None:
    found, drawn = {}, {}
    for name, loop in LOOPS.items():
        model, seen = adapted(STACKS[stack])
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        loop(model, batches(), tmp_path)
        found[name] = {n: p.detach() for n, p in model.named_parameters() if n in start}
        drawn[name] = seen
        assert any(not torch.equal(start[n], p) for n, p in found[name].items())
    for name in LOOPS:
        assert all(torch.equal(found[name][n], p) for n, p in found["plain"].items()), name
        assert drawn[name] == drawn["plain"], name
    calls = drawn["plain"]
    assert len(calls) == STEPS * ACCUMULATED
    assert calls[::2] == calls[1::2], "a rank is drawn for a step, not for a batch"
    if "dylora" in STACKS[stack]:
        assert all(len(set(ranks)) == 1 for ranks in calls), "one for all layers"
        assert len({ranks[0] for ranks in calls}) > 1


WORKER = """
    import hashlib, json, sys
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    import inlay
    from inlay.stack import need_state
    from inlay.testing.models import batch_for, build

    rank, folder, stack = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model = build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inlay.attach(model, stack, seed=3)
    whole = DistributedDataParallel(model.train())
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    inlay.lifecycle(model, optimizer, 8)
    torch.manual_seed(rank)  # what a process draws for itself differs
    drawn = []
    for step in range(8):
        deltas = [d for p in need_state(model).placed.values() for _, d in p.adapter.placed]
        drawn.append(sorted({int(d.drawn.count_nonzero()) for d in deltas if hasattr(d, "drawn")}))
        optimizer.zero_grad()
        batch = batch_for(model, rows=2, seed=10 * step + rank, labels=True)
        (whole(**batch).loss + inlay.auxiliary_loss(model)).backward()
        optimizer.step()
    tensors = [p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad]
    left = [int(d.values.count_nonzero()) for d in deltas if hasattr(d, "values")]
    print("RESULT", json.dumps([drawn, left, hashlib.sha256(b"".join(tensors)).hexdigest()]))
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_draw_the_same_ranks_and_end_alike(tmp_path: Path) -> None:
    """gloo, other data in each: both have the same ranks at each step, and the same weights in the end."""
    stack = "dylora(rank=4, targets=['value']) + adalora(rank=4, target_rank=2, targets=['query'])"
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WORKER), str(rank), str(tmp_path), stack],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    results = [[line for line in text.splitlines() if line.startswith("RESULT")] for text in told]
    assert results[0] == results[1]
    drawn, left, _ = json.loads(results[0][0].removeprefix("RESULT"))
    assert all(len(ranks) == 1 for ranks in drawn), "one for all layers"
    assert len({rank for (rank,) in drawn}) > 1
    assert sum(left) == 2 * len(left)
