"""Folders made to harm: each refused for its own reason, quickly, without memory, and without a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import folders
import make_hostile
import pytest
from make_hostile import HOSTILE
from torch import nn

import inlay
from inlay.errors import CheckpointError, InlayError
from inlay.manifest import FILE, MAX_BYTES
from inlay.tensorfile import MAX_HEADER
from inlay.testing.refusal import listing, refused
from inlay_scaling import IA3

HERE = Path(make_hostile.__file__).parent
MOST_SECONDS, MOST_MEGABYTES = 2.0, 40


def fresh() -> nn.Module:
    model = folders.base()
    inlay.attach(model, IA3(targets=["1"]), "before", seed=5)
    return model


def test_the_folders_are_what_the_script_makes(tmp_path: Path) -> None:
    make_hostile.make(tmp_path)
    made = {
        str(Path(k).relative_to(tmp_path)): v[1] for k, v in listing(tmp_path).items() if Path(k) != tmp_path
    }
    there = {
        str(Path(k).relative_to(HERE)): v[1]
        for d in sorted(HERE.iterdir())
        if d.is_dir() and d.name != "__pycache__"
        for k, v in listing(d).items()
    }
    assert made.keys() == there.keys()
    assert [k for k in made if made[k] != there[k]] == []


def test_the_folder_they_differ_from_loads() -> None:
    assert inlay.load(fresh(), HERE / "harmless", "fr") == 4


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused(name: str) -> None:
    model = fresh()
    with refused(InlayError, HOSTILE[name].says, model=model, folder=HERE / name) as caught:
        inlay.load(model, HERE / name, "fr")
    assert len(str(caught.error)) < 1500


@pytest.mark.parametrize("name", [n for n in HOSTILE if not n.startswith("tensors-elsewhere")])
def test_a_hostile_folder_is_not_saved_over(name: str, tmp_path: Path) -> None:
    """Reading what lies in a folder to compare stacks is reading a hostile file, too."""
    content = (HERE / name / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content)
    model = folders.adapted()
    with refused(
        CheckpointError, r"holds (a checkpoint of another stack|an inlay\.json)", model=model, folder=tmp_path
    ):
        inlay.save(model, tmp_path)


WIDE = 4096  # the features of the base whose adapter is large

MEASURE = """
import json, sys, time
import folders, inlay
from inlay.errors import InlayError

def peak(kind):
    return next(int(l.split()[1]) // 1024 for l in open("/proc/self/status") if l.startswith(kind))

wide, harmless, *paths = sys.argv[1:]
inlay.load(folders.base(), harmless, "fr")
found = []
for path in paths:
    model = folders.base(int(wide)) if path == paths[-1] else folders.base()
    before, start, loaded = (peak("VmPeak"), peak("VmHWM")), time.process_time(), True
    try:
        inlay.load(model, path, "fr")
    except InlayError:
        loaded = False
    grown = max(peak("VmPeak") - before[0], peak("VmHWM") - before[1])
    found.append([loaded, time.process_time() - start, grown])
print(json.dumps(found))
"""


def test_no_hostile_folder_costs_memory_or_time(tmp_path: Path) -> None:
    """A manifest of 1 kB with `rank: 5000000` must not make tensors of 1.3 GB each.

    Peaks of a process are compared, of virtual memory too: pages never touched count. The last folder
    really holds large tensors, and must be seen to cost what the others must not.
    """
    large = tmp_path / "large"
    inlay.save(folders.adapted(folders.LoRA(rank=WIDE, targets=["0"]), model=folders.base(WIDE)), large)
    paths = [HERE / name for name in HOSTILE]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(WIDE), *map(str, [HERE / "harmless", *paths, large])],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    *hostile, control = json.loads(done.stdout)
    assert len(hostile) == len(HOSTILE)
    costs = dict(zip(HOSTILE, hostile, strict=True))
    assert {n: c for n, c in costs.items() if c[0] or c[1] > MOST_SECONDS or c[2] > MOST_MEGABYTES} == {}
    assert control[0]
    assert control[2] > 2 * MOST_MEGABYTES


# -- files that a repository cannot hold ---------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.saved(tmp_path / "fr")


def refuse(folder: Path, match: str) -> None:
    model = fresh()
    with refused(CheckpointError, match, model=model):
        inlay.load(model, folder, "fr")


def test_a_manifest_without_end_is_not_read(folder: Path) -> None:
    with open(folder / FILE, "r+b") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no room
    refuse(folder, r"inlay\.json has 16,777,217 bytes, at most 16,777,216 are read")
    with open(folder / FILE, "r+b") as file:
        file.truncate(1 << 42)
    refuse(folder, r"inlay\.json has 4,398,046,511,104 bytes")


def test_a_long_list_is_refused(folder: Path) -> None:
    folders.edit(folder, lambda m: m["parts"][0]["data"].update(x=[0] * 100_001))
    refuse(folder, "a list of 100,001 items")


def test_a_header_without_end_is_not_parsed(folder: Path) -> None:
    name = folders.manifest_of(folder)["tensors"]
    with open(folder / name, "r+b") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(1 << 40)
    refuse(folder, "has a header of 16,777,217 bytes")


@pytest.mark.parametrize("which", [FILE, "tensors"])
def test_what_is_no_regular_file_is_not_opened(which: str, folder: Path) -> None:
    """Opening a pipe without a writer would wait for ever."""
    path = folder / (FILE if which == FILE else folders.manifest_of(folder)["tensors"])
    path.unlink()
    os.mkfifo(path)
    refuse(folder, "missing or not a regular file")
    path.unlink()
    path.mkdir()
    refuse(folder, "missing or not a regular file")
    path.rmdir()
    path.symlink_to("/dev/zero")
    refuse(folder, "missing or not a regular file")
    path.unlink()
    path.symlink_to("nowhere")
    refuse(folder, "missing or not a regular file")


def test_a_link_left_in_the_folder_is_not_written_through(folder: Path, tmp_path: Path) -> None:
    """Someone guesses the names of the files that saving will write, and links them elsewhere."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    name = folders.manifest_of(folder)["tensors"]
    for guess in (name, f".{name}.writing", f".{FILE}.writing", FILE):
        (folder / guess).unlink(missing_ok=True)
        (folder / guess).symlink_to(victim)
    inlay.save(folders.adapted(), folder, overwrite=True)
    assert victim.read_text() == "precious"
    assert inlay.load(folders.base(), folder) == 4
