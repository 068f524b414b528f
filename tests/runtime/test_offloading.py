"""Activations kept elsewhere, or computed twice: every face gets the gradients it gets without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from faces import FACES
from torch import Tensor, nn

import inlay
from inlay.testing.models import batch_for
from inlay.testing.tools import distance, lively, shake

pytest.importorskip("transformers")


def adapted(face: str) -> nn.Module:
    family, stack = FACES[face]
    model = lively(family)
    inlay.attach(model, stack, name="fr", seed=1)
    shake(model)
    return model.train()


class OnDisk(torch.autograd.graph.saved_tensors_hooks):
    """Keeps every tensor that is saved for backward in a file: what comes back is another tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Any:
        file = self.folder / f"{self.count}.pt"
        self.count += 1
        torch.save(tensor.detach(), file)
        return file

    def unpack(self, file: Path) -> Tensor:
        found: Tensor = torch.load(file, weights_only=True)
        return found


def gradients(model: nn.Module, kept: Any = None) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)  # the same dropout
    batch = {**batch_for(model, labels=True), "use_cache": False}
    if kept is None:
        loss = model(**batch).loss
    else:
        with kept:
            loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in found.values())
    return {n: g.clone() for n, g in found.items() if g is not None}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("face", FACES)
def test_activations_kept_elsewhere_change_no_bit(face: str, tmp_path: Path) -> None:
    model = adapted(face)
    expected = gradients(model)
    on_disk = OnDisk(tmp_path)
    equal(gradients(model, on_disk), expected)
    assert on_disk.count > 10
    equal(gradients(model, torch.autograd.graph.save_on_cpu()), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("face", FACES)
def test_blocks_computed_twice_beside_activations_kept_elsewhere(
    face: str, reentrant: bool, tmp_path: Path
) -> None:
    model: Any = adapted(face)
    expected = gradients(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, OnDisk(tmp_path))
    for name, gradient in expected.items():
        assert distance(found[name], gradient) < 1e-4, name
