"""Saving that is cut short: the old checkpoint or the new one, never neither, never a mixture."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from torch import nn

import inlay
from inlay import tensorfile
from inlay.errors import CheckpointError
from inlay.manifest import FILE
from inlay.stack import need_state
from inlay.testing.refusal import listing, refused

KILLS = 100

# One process imports everything once; each save that is killed runs in a child forked from it.
COMMON = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    import folders, inlay, torch
    from inlay.stack import need_state

    torch.set_num_threads(1)
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])

    def filled(value):
        model = folders.adapted(folders.LoRA(rank=64, targets=["0", "1"]))
        with torch.no_grad():
            for _, _, p in need_state(model).own_parameters():
                p.fill_(value)
        return model

    models = [filled(1.0), filled(2.0)]

    def loaded():
        # Loads strictly: a mixture, a partial file or a missing one raises.
        fresh = folders.base()
        inlay.load(fresh, folder)
        values = torch.cat([p.flatten() for _, _, p in need_state(fresh).own_parameters()]).unique()
        assert values.numel() == 1, values
        return int(values)

    def forked(work):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        return child

    before = inlay.save(models[0], folder)
    found = []
"""

# The child saves what is not there, and is killed at a random moment of it, or just after.
RANDOM = (
    COMMON
    + """
    draw, old, length = random.Random(0), 1, 0.0

    def save_in_child():
        ready, begin = os.pipe()

        def save():
            os.write(begin, b".")
            inlay.save(models[2 - old], folder)

        child = forked(save)
        os.read(ready, 1)
        os.close(ready), os.close(begin)
        return child

    for _ in range(5):
        child, start = save_in_child(), time.perf_counter()
        os.waitpid(child, 0)
        length, old = max(length, time.perf_counter() - start), loaded()
    for _ in range(kills):
        child = save_in_child()
        time.sleep(draw.uniform(0, length))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        names = sorted(p.name for p in folder.iterdir())
        now = loaded()
        found.append([now != old, len(names), any(n.endswith(".writing") for n in names)])
        old = now
    print(json.dumps(found))
"""
)

# The child is killed as it starts the n-th line of the code that writes, for every n.
EVERY_LINE = (
    COMMON
    + """
    from inlay import tensorfile

    def save_until(line):
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            if frame.f_code.co_filename != tensorfile.__file__:
                return None
            if event == "line":
                count += 1
                if count == line:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        inlay.save(models[1], folder)

    for line in range(1, kills):
        inlay.save(models[0], folder)
        _, status = os.waitpid(forked(lambda: save_until(line)), 0)
        names = sorted(p.name for p in folder.iterdir())
        found.append([loaded(), len(names), any(n.endswith(".writing") for n in names)])
        if not os.WIFSIGNALED(status):
            break
    print(json.dumps(found))
"""
)


def run(code: str, folder: Path, kills: int) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(folder), str(kills)],
        text=True,
        timeout=300,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_at_a_hundred_random_moments(tmp_path: Path) -> None:
    found = run(RANDOM, tmp_path / "fr", KILLS)
    assert len(found) == KILLS
    replaced = sum(new for new, _, _ in found)
    assert 5 < replaced < KILLS - 5  # both outcomes were met: saves that had begun were cut short


def test_killed_at_every_line_that_writes(tmp_path: Path) -> None:
    found = run(EVERY_LINE, tmp_path / "fr", 1000)
    values = [value for value, _, _ in found]
    commit = values.index(2)
    assert 20 < len(found) < 999  # the last one ran to its end
    assert values == [1] * commit + [2] * (len(values) - commit)  # one moment decides
    assert found[-1] == [2, 2, False]
    assert {count for _, count, _ in found} >= {2, 3, 4}  # with leftovers at times, and both files of tensors
    assert any(unfinished for _, _, unfinished in found)


def test_what_a_killed_save_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    folder = folders.saved(tmp_path / "fr")
    left = [f".adapter-{'0' * 64}.safetensors.writing", f".{FILE}.writing", f"adapter-{'0' * 64}.safetensors"]
    for name in left:
        (folder / name).write_bytes(b"half")
    inlay.load(folders.base(), folder)
    inlay.save(folders.adapted(), folder)
    assert len(list(folder.iterdir())) == 2


# -- failures that Python sees -------------------------------------------------------------------


@contextmanager
def limit(kind: int, most: int) -> Iterator[None]:
    """Lower a limit of this process for a while: writing beyond it fails as on a full disk."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def other() -> nn.Module:
    """Return a model whose stack is the saved one, with other values and a larger manifest."""
    model = folders.adapted()
    with torch.no_grad():
        for _, _, p in need_state(model).own_parameters():
            p.add_(1)
    need_state(model).placed[0].adapter.data["notes"] = ["x" * 4000] * 10
    return model


@pytest.mark.parametrize("most", [0, 1, 500, 1000, 5_000, 40_000], ids=lambda n: f"{n} bytes")
@pytest.mark.parametrize("there", [True, False], ids=["over a checkpoint", "in a new folder"])
def test_a_full_disk_leaves_the_old_checkpoint(most: int, there: bool, tmp_path: Path) -> None:
    """The first limits cut the tensors short (1.3 kB), the others the manifest (41 kB)."""
    folder = tmp_path / "deep" / "fr"
    if there:
        folders.saved(folder)
    model = other()
    match = r"the checkpoint could not be written[\s\S]*File too large[\s\S]*make room"
    with (
        refused(CheckpointError, match, model=model, folder=tmp_path) as caught,
        limit(resource.RLIMIT_FSIZE, most),
    ):
        inlay.save(model, folder)
    assert isinstance(caught.error.__cause__, OSError)
    if there:
        inlay.load(folders.base(), folder)
    inlay.save(model, folder)
    inlay.load(folders.base(), folder)


# An interrupt between opening a file and the `with` that closes it leaves that to the collector.
UNFINISHED = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line of the code that writes, as Ctrl-C would."""

    def __init__(self, line: int) -> None:
        self.line, self.count = line, 0

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code.co_filename != tensorfile.__file__ or code.co_name == "_turn" or self.count >= self.line:
            return None  # an interrupt while the lock is given back would keep it: the next save waits
        if event == "line":
            self.count += 1
            if self.count == self.line:
                raise KeyboardInterrupt
        return self


def interrupted(save: Callable[[], Any], line: int) -> bool:
    sys.settrace(Interrupt(line))
    try:
        save()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@UNFINISHED
def test_an_interrupt_at_every_line_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Just after the commit, too: then the new tensors must stay."""
    folder, old, new = tmp_path / "fr", folders.adapted(), other()
    digests, seen, line = [inlay.save(old, folder)], set(), 0
    digests.append(inlay.save(new, tmp_path / "new"))
    while True:
        line += 1
        inlay.save(old, folder)
        cut = interrupted(lambda: inlay.save(new, folder), line)
        seen.add(folders.manifest_of(folder)["digest"])
        inlay.load(folders.base(), folder)
        if not cut:
            break
    assert line > 20
    assert seen == {*digests}
    assert sorted(listing(folder)) == sorted([str(folder), *map(str, folder.iterdir())])


@UNFINISHED
def test_an_interrupt_in_a_new_folder_leaves_none(tmp_path: Path) -> None:
    model, line = folders.adapted(), 0
    while interrupted(lambda: inlay.save(model, tmp_path / "a" / "b"), line := line + 1):
        if (tmp_path / "a").exists():  # committed, or not begun to be cleared: what is there is whole
            inlay.load(folders.base(), tmp_path / "a" / "b")
            (tmp_path / "a").rename(tmp_path / f"kept{line}")
    assert line > 20


def test_a_folder_that_another_process_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = folders.saved(tmp_path), other()
    monkeypatch.setattr(tensorfile, "PATIENCE", 0.1)
    holder = os.open(folder, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    match = r"could not be written[\s\S]*another process has been writing there for 0\.1 s"
    with refused(CheckpointError, match, model=model, folder=folder):
        inlay.save(model, folder)
    os.close(holder)
    inlay.save(model, folder)


def test_processes_that_save_to_one_folder_take_turns(tmp_path: Path) -> None:
    """Every rank of a distributed run calls save: whatever their order, one whole checkpoint remains."""
    code = (
        COMMON
        + """
    def save_often():
        for _ in range(5):
            for model in random.sample(models, 2):
                inlay.save(model, folder)

    for status in [os.waitpid(child, 0)[1] for child in [forked(save_often) for _ in range(4)]]:
        assert status == 0
    print(json.dumps([loaded(), sorted(p.name for p in folder.iterdir())]))
    """
    )
    value, names = run(code, tmp_path / "fr", 0)
    assert value in (1, 2)
    assert len(names) == 2
