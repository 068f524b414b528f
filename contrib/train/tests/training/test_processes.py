"""`inlay train` in two real processes (gloo): the same run as in one, said and written once."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from inlay import InlayError
from inlay_train import processes
from inlay_train.cli import app
from inlay_train.items import counts_items

METHOD = "lora(rank=2) + prefix_tuning(length=2)"
STEPS, EVERY = 12, 3
CLOSE = 1e-5
Launched = list["subprocess.Popen[str]"]
Start = Callable[..., Launched]


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def two(*words: Any, each: tuple[dict[str, str], dict[str, str]] = ({}, {})) -> Launched:
    """Start `inlay` as two processes, as a launcher does; `each` adds to their environments."""
    rendezvous = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "inlay", *map(str, words)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(**rendezvous, RANK=str(rank), LOCAL_RANK=str(rank), **each[rank]),
        )
        for rank in range(2)
    ]  # fmt: skip


def ended(launched: Launched) -> tuple[list[int], list[str], list[str]]:
    """Wait for all; return their exit codes, outputs, and what of their error outputs is not a library's."""
    try:
        told = [process.communicate(timeout=280) for process in launched]
    finally:
        for process in launched:
            process.kill()
    errors = [
        re.sub(r"(?m)^(.*(torchao|_pytree\.py|\[transformers\]).*|\s*)$\n?", "", err) for _, err in told
    ]
    return [process.returncode for process in launched], [out for out, _ in told], errors


@pytest.fixture(scope="session")
def options(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose rows fill every batch, on a model without dropout."""
    folder = tmp_path_factory.mktemp("still")
    for file in models["bert"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    words = ["bright", "calm", "fine", "glad", "bleak", "cold", "dull", "grim"]
    rows = [(f"{words[i % 8]} and {words[(i * 3) % 8]}", "good" if i % 8 < 4 else "bad") for i in range(60)]
    for name, part in (("learn.csv", rows[:48]), ("held.csv", rows[48:59])):
        lines = [",".join(row) for row in part]
        (folder / name).write_text("\n".join(["text,label", *lines]) + "\n")
    return {"model": folder, "data": folder / "learn.csv", "eval-data": folder / "held.csv", "steps": STEPS,
            "task": "classification", "method": METHOD, "evaluate-every": EVERY, "eval-batch": 4,
            "keep": 5}  # fmt: skip


def train(options: dict[str, Any], **more: Any) -> list[str]:
    named = {**options, **{name.replace("_", "-"): value for name, value in more.items()}}
    return ["train", *[word for name, value in named.items() for word in (f"--{name}", str(value))]]


def figures(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "result.json").read_text()))


def weights(output: Path) -> dict[str, torch.Tensor]:
    (file,) = output.glob("adapter-*.safetensors")
    return dict(load_file(file))


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_two_processes_train_as_one_with_the_doubled_batch(options: dict[str, Any], tmp_path: Path) -> None:
    """Losses, evaluations and weights; batches gathered in one process are the same again."""
    both = two(*train(options, batch=4, output=tmp_path / "two"))
    for name, more in {"one": {"batch": 8}, "gathered": {"batch": 4, "accumulate": 2}}.items():
        result = CliRunner().invoke(app, train(options, output=tmp_path / name, **more))
        assert result.exit_code == 0, result.output
    codes, outputs, errors = ended(both)
    assert codes == [0, 0], outputs + errors
    found = {name: figures(tmp_path / name) for name in ("one", "two", "gathered")}
    for name in ("two", "gathered"):
        losses = zip(found["one"]["losses"], found[name]["losses"], strict=True)
        assert [step for (step, a), (_, b) in losses if abs(a - b) > CLOSE] == []
        for a, b in zip(found["one"]["evaluations"], found[name]["evaluations"], strict=True):
            # transformers' mean of batches takes in the rows that fill up the last one of a process
            assert {**a, "loss": 0} == {**b, "loss": 0}
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-2)
        assert farthest(weights(tmp_path / "one"), weights(tmp_path / name)) < CLOSE
    assert found["one"]["losses"][0][1] != pytest.approx(found["one"]["losses"][-1][1], abs=1e-3)
    told_and_written_once(tmp_path / "two", outputs, errors)


def told_and_written_once(output: Path, outputs: list[str], errors: list[str]) -> None:
    assert "48 rows to learn from, 11 to evaluate on" in outputs[0]
    assert outputs[0].count("results: ") == 1
    assert (outputs[1], errors[1]) == ("", "")
    files = {p.name for p in output.iterdir()}
    assert {"inlay.json", "README.md", "curve.png", "task.json", "result.json"} <= files
    last = {p.name for p in (output / f"checkpoint-{STEPS}").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "trainer_state.json", "inlay.json"} <= last
    assert len([name for name in last if name.startswith("adapter-")]) == 1
    assert json.loads((output / "_run" / "run.json").read_text())["processes"] == 2


def test_another_number_of_processes_is_another_run(options: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert CliRunner().invoke(app, train(options, output=output, batch=8)).exit_code == 0
    (output / "result.json").unlink()
    record = json.loads((output / "_run" / "run.json").read_text())
    (output / "_run" / "run.json").write_text(json.dumps({**record, "processes": 2}))
    result = CliRunner().invoke(app, [*train(options, output=output, batch=8), "--resume"])
    assert (result.exit_code, "processes: 2 then, 1 now" in result.output) == (1, True)


@pytest.mark.parametrize(
    ("kind", "counts"),
    [("BertForSequenceClassification", False), ("LlamaForSequenceClassification", False),
     ("T5ForConditionalGeneration", False), ("LlamaForCausalLM", True), ("GPT2LMHeadModel", True)],
)  # fmt: skip
def test_which_losses_count_the_items_of_a_step(kind: str, counts: bool) -> None:
    assert counts_items(getattr(transformers, kind).__new__(getattr(transformers, kind))) is counts


def test_one_process_where_several_were_asked_for_is_refused(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `accelerate launch --cpu --num_processes 2` sets; it starts one process."""
    for name, value in {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "True",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, train(options, output=tmp_path / "run"))
    assert result.exit_code == 1
    assert "several processes were asked for, and one was started\n  saw: MASTER_PORT" in result.output
    assert "torchrun --nproc-per-node 2 -m inlay train" in result.output
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InlayError, match=r"does not shard models yet(.|\n)*saw: ACCELERATE_USE_FSDP=true"):
        processes.join()


def test_deepspeed_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InlayError, match=r"DeepSpeed was asked for(.|\n)*do:  pip install deepspeed"):
        processes.join()


# -- slow: a process killed, and processes that differ -----------------------------------------------


def launch(launcher: str, words: list[str]) -> subprocess.Popen[str]:
    """Start `inlay` by a launcher, in a group of processes of its own."""
    commands = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                       "--num_machines", "1", "--mixed_precision", "no", "--main_process_port", free_port()],
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *commands[launcher], "-m", "inlay", *words], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(), start_new_session=True,
    )  # fmt: skip


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    """Return the process numbers of the launcher's workers, by rank."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == launcher.pid:
                    environ = dict(
                        v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v
                    )
                    found[int(environ["RANK"])] = int(entry.name)
            except (OSError, KeyError):
                continue
    return [found[rank] for rank in sorted(found)]


def killed(launcher: str, words: list[str], output: Path, step: int, pause: float, rank: int) -> str:
    """Begin or go on with a run, kill one of its processes after a step; return what was said."""
    run = launch(launcher, [*words, "--resume"])
    sign, end, numbers = output / f"checkpoint-{step}", time.monotonic() + 200, list[int]()
    while not sign.exists() and run.poll() is None:
        assert time.monotonic() < end, "the run does not come on"
        if len(numbers) < 2:
            numbers = workers(run)
        time.sleep(0.002)
    time.sleep(pause)
    try:
        os.kill(numbers[rank], signal.SIGKILL)
        told, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    return told


def finish(launcher: str, words: list[str]) -> None:
    run = launch(launcher, [*words, "--resume"])
    told, _ = run.communicate(timeout=280)
    assert run.returncode == 0, told


@pytest.fixture(scope="module")
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes that nothing interrupted; with dropout."""
    output = tmp_path_factory.mktemp("whole") / "run"
    finish("torchrun", train(with_dropout(options), batch=4, output=output))
    return output


def with_dropout(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "method": "lora(rank=2, dropout=0.1) + prefix_tuning(length=2)"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "rank", "step"), [("torchrun", 1, 3), ("accelerate", 0, 6), ("torchrun", 0, 9)]
)
def test_a_killed_process_ends_the_run_and_resuming_gives_the_same_weights(
    launcher: str, rank: int, step: int, options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """No process hangs; the other one says what to do, and where the run can go on."""
    output, draw = tmp_path / "run", random.Random(step)
    words = train(with_dropout(options), batch=4, output=output)
    began = time.monotonic()
    told = killed(launcher, words, output, step, draw.random() * 0.1, rank)
    assert time.monotonic() - began < 200
    if not (output / "result.json").exists():
        assert "another process of this run has ended, and so does this one" in told
        assert re.search(r"--resume: (checkpoint-\d+ is whole|there is no checkpoint yet)", told)
    finish(launcher, words)
    assert farthest(weights(output), weights(whole)) == 0.0
    assert figures(output)["losses"] == figures(whole)["losses"]


@pytest.mark.slow
def test_processes_that_differ_are_refused_with_the_difference(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """One without the package, one with another version of it, one with other settings."""
    wanted = {
        "absent": r"process 1 of 2 cannot take part: the stack needs methods(.|\n)*lora \(in inlay",
        "version": r"the package of 'lora': inlay-lora \S+ in process 0, inlay-lora 9\.9 in process 1",
    }
    other = tmp_path / "other" / "inlay_lora-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: inlay-lora\nVersion: 9.9\n")
    (other / "entry_points.txt").write_text("[inlay.methods]\nlora = inlay_lora:LoRA\n")
    differing = {
        "absent": {"INLAY_LOAD_PLUGINS": "inlay-prefix"},
        "version": {"PYTHONPATH": str(other.parent)},
    }
    for name, change in differing.items():
        output = tmp_path / name
        codes, _, errors = ended(two(*train(options, batch=4, output=output), each=({}, change)))
        assert codes == [1, 1]
        assert re.search(wanted[name], errors[0])
        assert errors[1] == ""
        assert not output.exists()
