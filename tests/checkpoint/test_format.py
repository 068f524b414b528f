"""The format of a folder: a golden outline of the manifest, and a folder that must always load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folders
import pytest
import torch

import inlay
from inlay import manifest
from inlay.manifest import BASE, PART, SHAPE
from inlay.stack import need_state
from inlay.testing.refusal import refused
from inlay_lora import LoRA
from inlay_scaling import IA3

HERE = Path(__file__).parent / "golden"
# What another release or machine may write differently, and settings, which belong to their methods.
VARYING = {"version", "versions", "seed", "settings", "torch", "inlay"}


def stack() -> Any:
    return LoRA(rank=2, targets=["0"]) + IA3(targets=["1"]).named("größe")


def outline(value: Any, key: str = "") -> Any:
    """Return a manifest with what varies replaced by the names of its types."""
    if key in VARYING:
        return type(value).__name__
    if isinstance(value, dict):
        return {k: outline(v, k) for k, v in sorted(value.items())}
    if isinstance(value, list):
        return [outline(v) for v in value]
    if isinstance(value, str) and len(value) >= 32:
        return (
            f"a digest of {len(value)}"
            if set(value) <= set("0123456789abcdef")
            else "adapter-<digest>.safetensors"
        )
    return value


def test_the_manifest_has_the_golden_outline(tmp_path: Path) -> None:
    """If this fails, the format changed: then FORMAT changes too, and both are read."""
    inlay.save(folders.adapted(stack()), tmp_path)
    golden = json.loads((HERE / "outline.json").read_text())
    assert outline(folders.manifest_of(tmp_path)) == golden
    assert set(SHAPE) == set(golden)
    assert set(PART) == set(golden["parts"][0])
    assert set(BASE) == set(golden["base"])


def test_a_folder_holds_two_files_and_the_tensors_one_key_each(tmp_path: Path) -> None:
    digest = inlay.save(folders.adapted(stack()), tmp_path)
    content = folders.manifest_of(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["inlay.json", content["tensors"]])
    assert sorted(folders.tensors_of(tmp_path)) == ["0/0.down", "0/0.up", "1/1.scale"]
    assert content["digest"] == digest == manifest.digest_of(content)
    (tmp_path / "inlay.json").write_text(
        json.dumps(content)
    )  # the digest is of what it says, not of its layout
    inlay.load(folders.base(), tmp_path, expected_digest=digest)


def test_a_folder_written_by_the_first_version_loads() -> None:
    """`golden/first` was written once and is never written again."""
    model = folders.base()
    assert (
        inlay.load(model, HERE / "first", "fr", expected_digest=(HERE / "first.digest").read_text().strip())
        == 3
    )
    assert [p.path for p in need_state(model).placed.values()] == ["fr/lora", "fr/größe"]
    x = (torch.arange(128).view(2, 64) % 11 - 5) / 8
    with torch.no_grad():
        expected = torch.tensor(json.loads((HERE / "first.output.json").read_text()))
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        with inlay.use(model):
            assert not torch.allclose(model(x), expected, atol=1e-2)


@pytest.mark.parametrize("number", [0, 2, -1, 10**6, "1", None, 1.5])
def test_another_format_is_refused(number: Any, tmp_path: Path) -> None:
    folders.saved(tmp_path)
    folders.edit(tmp_path, lambda m: m.update(format=number))
    model = folders.base()
    match = rf"has a format this version does not read[\s\S]*format {number!r}, this inlay reads 1"
    with refused(inlay.InlayError, match, model=model, folder=tmp_path):
        inlay.load(model, tmp_path)
