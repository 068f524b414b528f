"""What a real step takes in each of several processes (gloo), as measuring.py says it for one.

    python benchmarks/measuring_processes.py '{"model": …, "method": …, "processes": 2, "fsdp": true}'

A plain loop instead of the Trainer: FSDP2 with a unit per block, or DDP.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from measuring import MARK, peak
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

import inlay
from inlay.anatomy import Anatomy
from inlay_train.estimate import build
from inlay_train.estimate.request import DTYPES, Read, Request, read


def measured(request: Request) -> dict[str, Any]:
    """Return the largest peak of the processes, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, (request, folder), nprocs=request.processes)
        return {"peak": max(int(file.read_text()) for file in Path(folder).glob("peak-*"))}


def _process(rank: int, request: Request, folder: str) -> None:
    warnings.simplefilter("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=request.processes)
    found = read(request)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        inner, model = _model(request, found)
        optimizer = build.optimizer(request, inner, found.stack is not None)
        for number in range(2):
            batch = build.batch(request, found)
            if number == 1:
                with record_function(MARK):
                    pass
            model(**batch).loss.backward()
            optimizer.step()
            model.zero_grad()
    Path(folder, f"peak-{rank}").write_text(str(peak(seen)))
    distributed.destroy_process_group()


def _model(request: Request, found: Read) -> tuple[nn.Module, Any]:
    """Return the model, and what is called."""
    torch.manual_seed(0)
    made: Any = found.kind._from_config(found.config, dtype=getattr(torch, DTYPES[request.dtype])).train()
    if found.stack is not None:
        inlay.attach(made, found.stack, "default", seed=0)
    if not request.fsdp:
        return made, DistributedDataParallel(made)
    for block in Anatomy(made).blocks:
        fully_shard(block.module)
    fully_shard(made)
    return made, made


if __name__ == "__main__":
    print(json.dumps(measured(Request(**json.loads(sys.argv[1])))))
