"""FSDP2 on two real gloo processes: training an adapted model equals training in one process, bit for bit."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, lively

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

STACKS = {
    "lora": "lora(rank=4)",
    "stack": "lora(rank=4) + prefix_tuning(length=3, hidden=16) + ia3() + serial_adapter(rank=8)",
    "norms": "ln_tuning() + lora(rank=2)",
    "biases": "bitfit()",
    "directions": "lora(rank=2) + dora(rank=2)",  # reads the base's weight, and what learns below it
}

WORKER = """
    import json, sys
    from datetime import timedelta
    from pathlib import Path

    import torch
    import torch.distributed as dist

    import inlay
    from inlay import tensorfile
    from inlay.distributed import fill
    from inlay.testing.models import batch_for
    from inlay.testing.tools import shake
    from inlay.testing.tools import lively as any_lively

    rank, world = int(sys.argv[1]), int(sys.argv[2])
    folder, stacks = Path(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    if world > 1:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        store = dist.FileStore(str(folder / "store"), world)
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)

    def shard(model):
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        kinds = {type(p).__name__ for p in model.parameters()}
        assert kinds == {"DTensor"}, kinds

    def lively(family):
        return any_lively(family, attention_bias=True, mlp_bias=True)

    written, commit = [], tensorfile.commit
    tensorfile.commit = lambda folder, *rest: (written.append(folder.name), commit(folder, *rest))

    def full(tensor):
        tensor = tensor.detach()
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()

    def gradients(model, batches):
        if world > 1:
            model.reshard()  # an evaluation leaves the root's tensors whole, and their gradients out of sight
        model.zero_grad()  # before the forward: between it and the backward, FSDP shows other tensors
        losses = [model(**batch).loss for batch in batches]
        (sum(losses) / len(losses)).backward()
        return losses, {n: full(p.grad) for n, p in model.named_parameters() if p.requires_grad}

    def trained(model, batch):
        optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=1e-2), foreach=False)
        losses = []
        for _ in range(3):
            (loss,), found = gradients(model, [batch])
            losses.append(loss)
            inlay.check_training(model, optimizer)
            optimizer.step()
            with torch.no_grad():  # what an evaluation keeps must not outlive the next step
                losses.append(model(**batch).loss)
        return {"losses": torch.stack(losses).detach(), "gradients": found}

    def own_halves(model):
        # One process sees both halves; of two, each sees its own, and the gradients are averaged.
        halves = [batch_for(model, rows=1, seed=seed, labels=True) for seed in (1, 2)]
        return gradients(model, halves if world == 1 else halves[rank : rank + 1])[1]

    def run(name, stack):
        model = lively("llama")
        inlay.attach(model, stack, seed=1)
        shake(model)
        if world > 1:
            shard(model)
        batch = batch_for(model, rows=2, labels=True)
        found = trained(model, batch)
        found["halves"] = own_halves(model)
        with torch.no_grad():
            found["logits"] = model(**batch).logits
        found["weights"] = {n: full(p) for n, p in model.named_parameters()}
        found["digest"] = inlay.save(model, folder / f"{name}-of-{world}")  # all processes at once
        again = lambda model: inlay.attach(model, stack, name="b")
        refused = {"detach": inlay.detach, "merge": inlay.merge, "attach": again}
        for verb, operation in refused.items() if world > 1 else ():
            try:
                operation(model)
            except inlay.InlayError as error:
                found[verb] = str(error)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, found["logits"])
        torch.save(found, folder / f"{name}-{rank}-of-{world}.pt")

    def started(name, stack):
        # One process attaches to a whole model; two to one on meta, whose weights come when it is sharded.
        if world == 1:
            model = lively("llama")
            inlay.attach(model, stack, seed=5)
        else:
            whole = lively("llama")
            with torch.device("meta"):
                model = type(whole)(whole.config)
            inlay.attach(model, stack, seed=5)
            shard(model)
            model.to_empty(device="cpu")
            model.model.rotary_emb = type(model.model.rotary_emb)(whole.config)  # its tables are in no file
            set_model_state_dict(model, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
            fill(model)
        return inlay.save(model, folder / f"{name}-started-of-{world}")

    def reloaded():
        # torch.distributed.checkpoint: each process writes and reads its own parts, of model and optimizer.
        model = lively("llama")
        inlay.attach(model, stacks["stack"], seed=1)
        shard(model)
        optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
        batch = batch_for(model, rows=2, labels=True)

        def train():
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            return {n: full(p) for n, p in model.named_parameters()}

        def states():
            return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))

        train()
        dcp.save(states(), checkpoint_id=str(folder / "dcp"))
        expected = train()
        train()
        there = states()
        dcp.load(there, checkpoint_id=str(folder / "dcp"))
        set_state_dict(model, optimizer, model_state_dict=there["model"], optim_state_dict=there["optimizer"])
        found = train()
        inlay.set_trainable(model)
        inlay.set_trainable(model, "default")
        train()
        inlay.check_training(model, optimizer)
        return [n for n in expected if not torch.equal(found[n], expected[n])]

    def routed():
        model = lively("llama")
        inlay.attach(model, "lora(rank=2)", name="fr", seed=1)
        inlay.attach(model, "lora(rank=2) + ia3()", name="de", seed=2)
        inlay.set_trainable(model, "fr", "de")
        shake(model)
        batches = [batch_for(model, rows=1, seed=seed, labels=True) for seed in (1, 2)]
        if world > 1:
            shard(model)
            model.set_reduce_scatter_unused_params(True)
        losses = []
        for i in range(2) if world == 1 else [rank]:
            with inlay.route(model, ["fr", "de"][i : i + 1]):
                losses.append(model(**batches[i]).loss)
        (sum(losses) / len(losses)).backward()
        return {n: full(p.grad) for n, p in model.named_parameters() if p.requires_grad}

    for name, stack in stacks.items():
        run(name, stack)
    extra = {"started": {name: started(name, stack) for name, stack in stacks.items()}, "routed": routed()}
    if world > 1:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        extra["reloaded"] = reloaded()
        model = lively("llama")
        inlay.attach(model, "lora(rank=2)")
        shard(model)
        try:
            inlay.save(model, "/proc/none/of/these")
        except inlay.InlayError as error:
            extra["failed"] = str(error)
    extra["written"] = written
    torch.save(extra, folder / f"extra-{rank}-of-{world}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every stack in one process and, at the same time, in two; return the folder of what they saw.

    Workers of one test run share it: the first to come trains, the others wait.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "fsdp"
    with open(root / "fsdp.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir()
            train(folder)
            (folder / "done").touch()
    return folder


def train(folder: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WORKER)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), json.dumps(STACKS)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for world in (1, 2) for rank in range(world)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(outputs)


def found(folder: Path, stack: str, rank: int, world: int) -> dict[str, Any]:
    seen: dict[str, Any] = torch.load(folder / f"{stack}-{rank}-of-{world}.pt")
    return seen


def extra(folder: Path, rank: int, world: int) -> dict[str, Any]:
    seen: dict[str, Any] = torch.load(folder / f"extra-{rank}-of-{world}.pt")
    return seen


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stack", STACKS)
def test_two_processes_train_as_one_to_the_bit(stack: str, rank: int, runs: Path) -> None:
    one, two = found(runs, stack, 0, 1), found(runs, stack, rank, 2)
    assert float(one["losses"][-1]) < float(one["losses"][0])
    assert torch.equal(two["losses"], one["losses"])
    assert torch.equal(two["logits"], one["logits"])
    for kind in ("gradients", "weights"):
        assert two[kind].keys() == one[kind].keys()
        assert [n for n in one[kind] if not torch.equal(two[kind][n], one[kind][n])] == []
    assert len(one["gradients"]) >= 5
    assert all(float(g.norm()) > 0 for g in one["gradients"].values())


@pytest.mark.parametrize("stack", STACKS)
def test_gradients_of_the_processes_own_rows_are_averaged(stack: str, runs: Path) -> None:
    one = found(runs, stack, 0, 1)["halves"]
    for rank in range(2):
        two = found(runs, stack, rank, 2)["halves"]
        assert two.keys() == one.keys()
        assert all(distance(two[n], g) < 1e-5 for n, g in one.items())


@pytest.mark.parametrize("stack", STACKS)
def test_a_sharded_model_is_saved_whole(stack: str, runs: Path) -> None:
    expected = found(runs, stack, 0, 1)["logits"]
    for world in (1, 2):
        model = lively("llama", attention_bias=True, mlp_bias=True)
        inlay.load(model, runs / f"{stack}-of-{world}")
        with torch.no_grad():
            assert torch.equal(model(**batch_for(model, rows=2, labels=True)).logits, expected)


@pytest.mark.parametrize("stack", STACKS)
def test_the_first_process_writes_once_what_one_process_would(stack: str, runs: Path) -> None:
    """Every process returns the digest, which covers settings, base and values to the bit."""
    digests = {found(runs, stack, rank, world)["digest"] for rank, world in ((0, 1), (0, 2), (1, 2))}
    assert len(digests) == 1
    written = {rank: extra(runs, rank, 2)["written"] for rank in range(2)}
    assert written[0].count(f"{stack}-of-2") == 1
    assert written[1] == []


@pytest.mark.parametrize("stack", STACKS)
def test_a_model_begun_on_meta_starts_with_the_values_of_one_process(stack: str, runs: Path) -> None:
    expected = extra(runs, 0, 1)["started"][stack]
    assert [extra(runs, rank, 2)["started"][stack] for rank in range(2)] == [expected, expected]


def test_what_cannot_be_written_fails_in_every_process(runs: Path) -> None:
    said = {extra(runs, rank, 2)["failed"] for rank in range(2)}
    assert len(said) == 1
    assert "the checkpoint could not be written\n  saw: FileNotFoundError" in said.pop()


def test_torchs_own_checkpoint_of_a_sharded_model_and_optimizer(runs: Path) -> None:
    assert [extra(runs, rank, 2)["reloaded"] for rank in range(2)] == [[], []]


def test_processes_that_route_differently_may_scatter_what_they_did_not_use(runs: Path) -> None:
    one = extra(runs, 0, 1)["routed"]
    for rank in range(2):
        two = extra(runs, rank, 2)["routed"]
        assert two.keys() == one.keys()
        assert all(distance(two[n], g) < 1e-5 for n, g in one.items())


REFUSALS = {
    "detach": r"changed its class after the adapter was attached\n  saw: .* is now .*\.FSDP\w+\n",
    "merge": r"the weight cannot be written\n  saw: .*: its weight is sharded",
    "attach": r"the model is sharded already(.|\n)*is one process's part of a tensor",
}


@pytest.mark.parametrize("verb", REFUSALS)
def test_what_would_go_under_the_shards_is_refused(verb: str, runs: Path) -> None:
    """Each leaves the model as it was, which the processes themselves look at."""
    for rank in range(2):
        assert re.search(REFUSALS[verb], found(runs, "lora", rank, 2)[verb])
