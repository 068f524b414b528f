"""R33 and R34: what is written is what was promised, and what is read is checked by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from hypothesis import find
from torch import Tensor

import inlay
from inlay.checkpoint import CALIBRATION
from inlay.errors import CheckpointError
from inlay.stack import need_state
from inlay.testing.cases import NAME, Case, Joined, Member
from inlay.testing.folders import edit_tensors, manifest_of
from inlay.testing.folders import tensors_of as in_file
from inlay.testing.refusal import refused
from inlay.testing.rule import need, rule
from inlay.testing.rules.files import trained

WRITE = "INLAY_WRITE_GOLDEN"
NAMES = ("missing", "unknown")  # damages that change no tensor
Tensors = dict[str, Tensor]
DAMAGES: dict[str, tuple[Callable[[Tensors, str], Any], str]] = {
    "missing": (lambda tensors, key: tensors.pop(key), "lacks tensors"),
    "unknown": (lambda tensors, key: tensors.update({f"{key}_": tensors[key].clone()}), "has unknown"),
    "misshapen": (lambda tensors, key: tensors.update({key: tensors[key].unsqueeze(0)}), "wrong shape"),
    "not finite": (lambda tensors, key: tensors[key].fill_(torch.nan), "not finite"),
}


@rule(
    "R33",
    "A damaged checkpoint is refused by name",
    means="a file in which a tensor is missing, unknown, misshapen or not finite is refused before "
    "anything is touched, and the error names the tensor.",
    usually="`state_dict` gives other names than the adapter's own, or `migrate` fills in what is missing.",
    dtypes=("float32",),
    share=0.34,
    alone=True,
)
def refuses_damage(case: Case) -> None:
    model, fresh = trained(case), case.model()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "good")
        inlay.save(model, folder)
        keys = sorted(in_file(folder))
        key = keys[case.seed % len(keys)]
        local = key.partition("/")[2].removeprefix(CALIBRATION)
        for damage, (change, says) in DAMAGES.items():
            if CALIBRATION in key and damage not in NAMES:
                continue  # what was measured may be of any shape and dtype
            bad = Path(shutil.copytree(folder, Path(home, damage)))
            edit_tensors(bad, lambda tensors, change=change: change(tensors, key))  # type: ignore[misc]
            with refused(CheckpointError, f"(?s){says}.*{re.escape(local)}", model=fresh, folder=bad):
                inlay.load(fresh, bad, NAME)


@rule(
    "R34",
    "The format stays",
    means="the method's simplest configuration is saved with the settings, names, shapes and dtypes of "
    "tensors that the golden file beside the tests lists.",
    usually="a setting, delta or parameter was renamed: raise the method's `version`, give it a "
    f"`migrate`, and write the file anew with {WRITE}=1; a new method has no such file yet: write it "
    "likewise.",
    once=True,
)
def format_stays(joined: Joined) -> None:
    need(joined.golden is not None, "no folder is declared for golden files")
    family = next(f for f in ("bert", *joined.families) if f in joined.families)
    method = find(joined.configurations, lambda _: True, random=Random(0))  # whatever ran before
    case = Case(family, torch.float32, (Member("subject", method, joined),))
    found = outline(case)
    path = Path(str(joined.golden), f"{joined.name or joined.kind.id}.json")
    if os.environ.get(WRITE):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    need(path.is_file(), f"there is no golden file {path}; write it with {WRITE}=1")
    golden = json.loads(path.read_text())
    wrong = sorted(k for k in golden.keys() | found.keys() if golden.get(k) != found.get(k))
    need(not wrong, f"{path.name} and what is saved now differ in: {_differences(golden, found, wrong)}")


def outline(case: Case) -> dict[str, Any]:
    """Return what a checkpoint of the case's method says about it, and its tensors' dtypes and shapes."""
    model = case.attached()
    with tempfile.TemporaryDirectory() as folder:
        inlay.save(model, folder)
        (entry,) = manifest_of(Path(folder))["parts"]
    (placed,) = need_state(model).placed.values()
    measured = {f"calibration: {k}": t for k, t in placed.adapter.calibration.items()}
    state = {**placed.adapter.tensors(), **measured}
    tensors = {k: [str(t.dtype).removeprefix("torch."), *t.shape] for k, t in state.items()}
    kept = ("method", "method_version", "settings", "calibration")
    return {**{key: entry[key] for key in kept}, "tensors": tensors}


def _differences(golden: dict[str, Any], found: dict[str, Any], keys: list[str]) -> str:
    return "; ".join(f"{key}: {golden.get(key)!r} then, {found.get(key)!r} now"[:400] for key in keys)
