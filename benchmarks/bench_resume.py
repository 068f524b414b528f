"""Runs killed by SIGKILL at random steps and resumed: how many end with the bits of a run that was not.

On the CPU in float32, tiny BERTs with dropout, stacks whose methods act around each optimizer step. Each run
is a process of its own, forked from this one so that it need not import anything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from common import RESULTS, machine
from safetensors.torch import load_file

import inlay
from inlay.testing.models import batch_for, build
from inlay_train import base
from inlay_train.trainer import Trainer

STEPS, EVERY, NAME = 12, 3, "fr"
STACKS = (
    "adalora(rank=3, target_rank=2, t_final=2, dropout=0.1) + serial_adapter(rank=2)",
    "dylora(rank=3, dropout=0.1) + prefix_tuning(length=2)",
)
Told = Callable[[int], object]


def plain(stack: str, folder: Path, told: Told) -> None:
    """Train in a loop written by hand that saves every few steps, on from the last of these."""
    model, saved = build("bert").train(), max(folder.glob("checkpoint-*"), default=None)
    if saved is None:
        torch.manual_seed(1)
        inlay.attach(model, stack, NAME)
    else:
        inlay.load(model, saved, NAME)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    following = inlay.lifecycle(model, optimizer, STEPS)
    if saved is not None:
        state = torch.load(saved / "training.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        following.load_state_dict(state["lifecycle"])
        torch.set_rng_state(state["random"])
    while following.step < STEPS:
        optimizer.zero_grad()
        batch = batch_for(model, seed=following.step, labels=True)
        (model(**batch).loss + inlay.auxiliary_loss(model)).backward()
        optimizer.step()
        told(following.step)
        if following.step % EVERY == 0:
            new = folder / "new"
            shutil.rmtree(new, ignore_errors=True)
            inlay.save(model, new, NAME)
            state = {"optimizer": optimizer.state_dict(), "lifecycle": following.state_dict()}
            torch.save({**state, "random": torch.get_rng_state()}, new / "training.pt")
            new.rename(folder / f"checkpoint-{following.step:03}")
    inlay.save(model, folder / "end", NAME)


class Telling(transformers.TrainerCallback):
    """Tells of each step that was made."""

    def __init__(self, told: Told) -> None:
        self.told = told

    def on_step_end(
        self, args: object, state: transformers.TrainerState, control: object, **_: object
    ) -> None:
        self.told(state.global_step)


def trainer(stack: str, folder: Path, told: Told) -> None:
    """Train by `inlay_train.Trainer`."""
    base.quiet()
    model = build("bert")
    inlay.attach(model, stack, NAME)
    batch = batch_for(model, rows=24, labels=True)
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(24)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, save_steps=EVERY, per_device_train_batch_size=4,
        report_to="none", use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    made = Trainer(model, arguments, train_dataset=rows, callbacks=[Telling(told)])  # type: ignore[arg-type]
    made.train(resume_from_checkpoint=made.last_checkpoint() is not None)
    inlay.save(model, folder / "end", NAME)


LOOPS = {"plain PyTorch": plain, "inlay_train.Trainer": trainer}


def run(loop: str, stack: str, folder: Path, kill_at: int | None, pause: float = 0.0) -> bool:
    """Train in a process of its own; kill it some seconds after a step. Return whether it came to its end."""
    folder.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        try:
            sys.stdout = sys.stderr = (folder / "said").open("a")
            LOOPS[loop](stack, folder, lambda step: os.write(writing, bytes([step])))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    while step := os.read(reading, 1):
        if step[0] == kill_at:
            time.sleep(pause)
            os.kill(process, signal.SIGKILL)
            break
    os.close(reading)
    ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if ended not in (0, -signal.SIGKILL):
        raise SystemExit(f"{loop}, {stack}: {(folder / 'said').read_text()[-2000:]}")
    return ended == 0


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "end").glob("*.safetensors")))


def measure(kills: int, seed: int, work: Path) -> dict[str, dict[str, int]]:
    """Return, for each loop, how many runs were killed and how many of them ended with the same bits."""
    draw, counted = random.Random(seed), {}
    for loop in LOOPS:
        wholes = [work / f"{loop} {number} whole" for number in range(len(STACKS))]
        for stack, folder in zip(STACKS, wholes):
            run(loop, stack, folder, None)
        killed = same = 0
        for number in range(kills):
            which, folder = number % len(STACKS), work / f"{loop} {number}"
            step, pause = draw.randint(1, STEPS - 1), draw.uniform(0, 0.03)
            killed += not run(loop, STACKS[which], folder, step, pause)
            run(loop, STACKS[which], folder, None)
            mine, theirs = tensors(folder), tensors(wholes[which])
            same += mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
            shutil.rmtree(folder)
        counted[loop] = {"killed": killed, "identical": same, "runs": kills}
        print(f"{loop}: {same} of {kills} identical, {killed} of them killed before their end")
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each loop")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        counted = measure(given.kills, given.seed, Path(work))
    content = {"benchmark": "resume", "machine": machine(), "steps": STEPS, "every": EVERY, "stacks": STACKS}
    (RESULTS / "resume.json").write_text(json.dumps({**content, "loops": counted}, indent=1) + "\n")


if __name__ == "__main__":
    main()
