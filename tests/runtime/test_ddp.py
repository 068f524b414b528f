"""DistributedDataParallel on two real gloo processes: a plain loop equals one process, however it routes."""

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
from inlay.errors import AttachError, CheckpointError
from inlay.testing.models import batch_for
from inlay.testing.tools import lively
from inlay.weights import whole

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

CLOSE = 1e-5
WAYS = {"plain": {}, "unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}

WORKER = """
    import json, sys
    from datetime import timedelta
    from pathlib import Path

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import inlay
    from inlay.distributed import check_same
    from inlay.testing.models import batch_for
    from inlay.testing.tools import lively, shake

    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if world > 1:
        store, limit = dist.FileStore(str(folder / "store"), world), timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    mine = [0, 1] if world == 1 else [rank]  # one process has both processes' rows

    def wrapped(model, **settings):
        return DistributedDataParallel(model, **settings) if world > 1 else model

    def gradients(model):
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def step(model, routes, batches):
        losses = []
        for i in mine:
            with inlay.route(model, routes[i]) if routes else inlay.use(model, "fr", "de"):
                losses.append(model(**batches[i]).loss)
        loss = sum(losses) / len(losses)
        (loss + inlay.auxiliary_loss(model)).backward()
        return loss.detach()

    def two_adapters(family):
        model = lively(family).train()
        inlay.attach(model, "lora(rank=4)", name="fr", seed=1)
        inlay.attach(model, "lora(rank=2) + ia3() + prefix_tuning(length=3, hidden=16)", name="de", seed=2)
        inlay.set_trainable(model, "fr", "de")
        shake(model)
        return model

    def trained(**settings):
        model = two_adapters("llama")
        outer = wrapped(model, **settings)
        optimizer = torch.optim.AdamW(inlay.parameter_groups(outer, lr=1e-2), foreach=False)
        losses = []
        for number in range(5):
            optimizer.zero_grad()
            batches = [batch_for(model, rows=2, seed=2 * number + i, labels=True) for i in range(2)]
            losses.append(step(outer, None, batches))
            inlay.check_training(outer, optimizer)
            optimizer.step()
        weights = {n: p.detach() for n, p in model.named_parameters()}
        return {"losses": torch.stack(losses), "weights": weights}

    def routed(routes, **settings):
        # What a process has no row for gets its gradient from the others'. DDP notices late: three steps.
        model = two_adapters("llama")
        outer = wrapped(model, **settings)
        batches = [batch_for(model, rows=2, seed=i, labels=True) for i in (1, 2)]
        for _ in range(3):
            model.zero_grad()
            step(outer, routes, batches)
        return gradients(model)

    def experts(**settings):
        # Two tokens a process choose two experts of three each: some expert gets none.
        model = lively("mixtral").train()
        inlay.attach(model, "lora(rank=2, targets=['*.experts.*'])", seed=1)
        shake(model)
        outer = wrapped(model, **settings)
        for _ in range(2):
            model.zero_grad()
            outputs = [outer(**batch_for(model, rows=1, length=1, seed=i)).logits for i in mine]
            (sum(o.square().mean() for o in outputs) / len(outputs)).backward()
        return gradients(model)

    def checkpointed():
        model = two_adapters("llama")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        outer = wrapped(model)
        for _ in range(2):
            model.zero_grad()
            step(outer, ROUTES["languages"], [batch_for(model, rows=2, seed=i, labels=True) for i in (1, 2)])
        return gradients(model)

    ROUTES = {"languages": [["fr", "fr"], ["de", "de"]], "none here": [[None, None], ["de", ("fr", "de")]]}
    WAYS = json.loads(sys.argv[4])
    found = {"checkpointed": checkpointed()}
    for way, settings in WAYS.items():
        found[f"{way}, trained"] = trained(**settings)
        if world > 1 or way == "plain":
            for name, routes in ROUTES.items():
                if way != "static" or name == "languages":
                    found[f"{way}, {name}"] = routed(routes, **settings)
    found["experts"] = experts()
    if world > 1:
        model = lively("llama")
        inlay.attach(model, "lora(rank=2)", seed=rank)
        try:
            check_same(model)
        except inlay.InlayError as error:
            found["differing"] = str(error)
        inlay.detach(model)
        inlay.attach(model, "lora(rank=2)", seed=3)
        check_same(model)
        outer = wrapped(model)
        found["summary"] = str(inlay.summary(outer))
        try:
            inlay.attach(outer, "ia3()", "b")
        except inlay.InlayError as error:
            found["attach"] = str(error)
    torch.save(found, folder / f"{rank}-of-{world}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process saw, and each of two."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "ddp"
    with open(root / "ddp.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir()
            start(folder)
            (folder / "done").touch()
    return {name: torch.load(folder / f"{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2")}


def start(folder: Path) -> None:
    fixed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **fixed}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WORKER)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), json.dumps(WAYS)], env=environment, text=True,
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


def farthest(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of what both have; one process gives an unused tensor no gradient."""
    assert one.keys() <= two.keys()
    assert [n for n in two.keys() - one.keys() if two[n].any()] == []
    return max(float((two[n] - tensor).abs().max()) for n, tensor in one.items())


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_loop_equals_one_process_with_both_processes_rows(way: str, runs: dict[str, Any]) -> None:
    one, first, second = (runs[name][f"{way}, trained"] for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert float(one["losses"][-1]) != float(one["losses"][0])
    assert ((first["losses"] + second["losses"]) / 2 - one["losses"]).abs().max() < CLOSE
    for two in (first, second):
        assert farthest(one["weights"], two["weights"]) < CLOSE
    assert farthest(first["weights"], second["weights"]) == 0.0


# Where a process now and then routes none at all, its graph is not the same each time: no static graph.
ROUTED = [(way, "languages") for way in WAYS] + [("plain", "none here"), ("unused", "none here")]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("way", "routes"), ROUTED)
def test_what_a_process_has_no_rows_for_does_not_stop_reduction(
    way: str, routes: str, rank: int, runs: dict[str, Any]
) -> None:
    """Each process routes other adapters, or none at all; the gradients are one process's."""
    one, two = runs["0-of-1"][f"plain, {routes}"], runs[f"{rank}-of-2"][f"{way}, {routes}"]
    assert len(two) > 20
    assert farthest(one, two) < CLOSE
    assert any("inlay.0" in n and two[n].any() for n in two)
    assert any("inlay.1" in n and two[n].any() for n in two)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["experts", "checkpointed"])
def test_experts_without_tokens_and_checkpointed_blocks_are_reduced(
    what: str, rank: int, runs: dict[str, Any]
) -> None:
    assert farthest(runs["0-of-1"][what], runs[f"{rank}-of-2"][what]) < CLOSE


def test_processes_about_to_train_different_things_are_told_so(runs: dict[str, Any]) -> None:
    (text,) = {runs[name]["differing"] for name in ("0-of-2", "1-of-2")}
    assert text.startswith("the processes are not about to train the same\n  saw: \n")
    assert re.search(r"\n  default/lora, values: \w+ in process 0, \w+ in process 1\n", text)


def test_a_wrapped_model_is_known_and_nothing_is_attached_to_it(runs: dict[str, Any]) -> None:
    assert runs["0-of-2"]["summary"].startswith("default/lora: lora, 4 sites")
    assert "its wrapper would not know the adapter's tensors" in runs["0-of-2"]["attach"]
    outer = torch.nn.DataParallel(lively("llama"))
    with pytest.raises(AttachError, match=r"a DataParallel(.|\n)*attach to the model inside \(\.module\)"):
        inlay.attach(outer, "lora(rank=2)")


def test_a_compiled_model_is_looked_through() -> None:
    model = lively("llama")
    inlay.attach(model, "lora(rank=2)")
    compiled: Any = torch.compile(model, backend="eager")
    assert str(inlay.summary(compiled)) == str(inlay.summary(model))
    compiled(**batch_for(model, labels=True)).loss.backward()
    inlay.check_training(compiled, torch.optim.SGD(inlay.parameter_groups(compiled, lr=0.1)))


def test_what_only_deepspeed_can_put_together_is_not_saved_empty() -> None:
    """ZeRO stage 3 leaves parameters of no values, marked by an id of its own; it is not installed here."""
    tensor = torch.nn.Parameter(torch.empty(0))
    tensor.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"that only DeepSpeed can put together(.|\n)*GatheredParam"):
        whole(tensor)
