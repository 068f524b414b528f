"""What is saved comes back, bit for bit, in another model; what else is in a folder stays."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import folders
import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.authoring import Adapter, hookimpl
from inlay.errors import CheckpointError
from inlay.registry import registry
from inlay.stack import need_state
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import listing, refused
from inlay_adapter import ParallelAdapter, SerialAdapter
from inlay_lora import DoRA, LoRA
from inlay_prefix import PrefixTuning
from inlay_scaling import IA3, SSF
from inlay_selective import BitFit, LNTuning

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def shaken(model: nn.Module, stack: Any, name: str = "fr", **options: Any) -> nn.Module:
    inlay.attach(model, stack, name, **options)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for _, _, p in need_state(model).own_parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=0.1)
    return model


STACKS = {
    "llama": ("llama", LoRA() + PrefixTuning(length=2, hidden=4) + IA3(), ("head",)),
    "bert": ("bert", SerialAdapter() + BitFit() + LNTuning(), ("head",)),
    "gpt2": ("gpt2", DoRA() + ParallelAdapter(rank=2), ()),
    "t5": ("t5", IA3() + LoRA(targets=["cross_attention"]) + PrefixTuning(length=2, hidden=4), ()),
    "vit": ("vit", SSF() + LoRA(), ("head",)),
}


@pytest.mark.parametrize(("family", "stack", "train"), STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stack_comes_back(
    family: str, stack: Any, train: tuple[str, ...], dtype: Any, tmp_path: Path
) -> None:
    model, fresh = build(family, dtype=dtype), build(family, dtype=dtype)
    batch = batch_for(model)
    with torch.no_grad():
        plain = model(**batch).logits
        shaken(model, stack, train=train)
        digest = inlay.save(model, tmp_path, "fr")
        count = inlay.load(fresh, tmp_path, "other", expected_digest=digest)
        assert torch.equal(model(**batch).logits, fresh(**batch).logits)
        assert not torch.equal(model(**batch).logits, plain)
    assert count == sum(len(p.adapter.tensors()) for p in need_state(model).placed.values()) > 0
    assert inlay.save(fresh, tmp_path / "again") == digest


def test_each_part_of_a_stack_loads_alone(tmp_path: Path) -> None:
    stack = LoRA(rank=2, targets=["0"]) + LoRA(rank=3, targets=["1"]).named("second") + IA3(targets=["0"])
    model = shaken(folders.base(), stack)
    for part in ("lora", "second", "ia3"):
        inlay.save(model, tmp_path / part, f"fr/{part}")
        fresh = folders.base()
        inlay.load(fresh, tmp_path / part, "it")
        with inlay.use(model, f"fr/{part}"):
            assert torch.equal(output(model), output(fresh))
        assert [p.path for p in need_state(fresh).placed.values()] == [f"it/{part}"]


def test_all_active_adapters_are_saved_in_their_order(tmp_path: Path) -> None:
    model = folders.base()
    for name in ("fr", "de", "off"):
        shaken(
            model,
            LoRA(rank=1, targets=["0"]) + IA3(targets=["0"]).named(f"ia3 {name}"),
            name,
            activate=name != "off",
        )
    inlay.save(model, tmp_path)
    fresh = folders.base()
    inlay.load(fresh, tmp_path)
    assert torch.equal(output(model), output(fresh))
    names = [p.part_name for p in need_state(fresh).placed.values()]
    assert names == ["fr:lora", "ia3 fr", "de:lora", "ia3 de"]


def test_idle_adapters_are_saved_if_nothing_is_active(tmp_path: Path) -> None:
    model = shaken(folders.base(), LoRA(targets=["0"]), activate=False)
    inlay.save(model, tmp_path)
    fresh = folders.base()
    inlay.load(fresh, tmp_path, activate=False, trainable=False)
    assert torch.equal(output(fresh), output(folders.base()))
    assert not any(p.requires_grad for p in fresh.parameters())


def test_parts_that_draw_what_is_not_saved_draw_the_same(tmp_path: Path) -> None:
    """The second adapter keeps its own seed, though both lie in one folder."""

    @dataclass(frozen=True)
    class Half(LoRA):
        id: ClassVar[str] = "half"

        @staticmethod
        @hookimpl
        def state_dict(method: Any, adapter: Adapter) -> dict[str, Tensor]:
            return {k: t for k, t in adapter.tensors().items() if not k.endswith("down")}

    registry.register(Half)
    try:
        model = folders.base()
        inlay.attach(model, Half(targets=["0"]), "a", seed=3)
        inlay.attach(model, Half(targets=["1"]), "b", seed=77)
        with torch.no_grad():
            for _, name, p in need_state(model).own_parameters():
                if name.endswith("up"):
                    p.fill_(0.3)
        inlay.save(model, tmp_path)
        fresh = folders.base()
        assert inlay.load(fresh, tmp_path) == 2
        assert torch.equal(output(model), output(fresh))
        assert not torch.equal(output(fresh), output(folders.base()))
    finally:
        registry.forget(Half)


def test_saving_is_the_same_twice_and_elsewhere(tmp_path: Path) -> None:
    model = folders.adapted()
    first, second = (
        inlay.save(model, tmp_path / "a"),
        inlay.save(folders.adapted(), str(tmp_path / "deep" / "b")),
    )
    assert first == second
    files = [{p.name: p.read_bytes() for p in d.iterdir()} for d in (tmp_path / "a", tmp_path / "deep" / "b")]
    assert files[0] == files[1]
    assert len(files[0]) == 2


def test_saving_again_replaces_the_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    model = folders.adapted()
    inlay.save(model, tmp_path)
    for name in ("model.safetensors", "adapter-mine.safetensors", ".hidden", "notes.txt"):
        (tmp_path / name).write_text("keep me")
    (tmp_path / ("adapter-" + "0" * 64 + ".safetensors")).write_text("left over by a save that was killed")
    (tmp_path / (".adapter-" + "0" * 64 + ".safetensors.writing")).write_text("left over")
    (tmp_path / ".inlay.json.writing").symlink_to(tmp_path / "notes.txt")
    with torch.no_grad():
        next(p for _, _, p in need_state(model).own_parameters()).add_(1)
    inlay.save(model, tmp_path)  # the same stack: no overwrite needed
    mine = {"model.safetensors", "adapter-mine.safetensors", ".hidden", "notes.txt"}
    left = {p.name for p in tmp_path.iterdir()}
    assert left - mine == {"inlay.json", folders.manifest_of(tmp_path)["tensors"]}
    assert all((tmp_path / name).read_text() == "keep me" for name in mine)
    fresh = folders.base()
    inlay.load(fresh, tmp_path)
    assert torch.equal(output(model), output(fresh))


def test_saving_again_repairs_damaged_tensors(tmp_path: Path) -> None:
    folders.saved(tmp_path)
    file = tmp_path / folders.manifest_of(tmp_path)["tensors"]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    inlay.save(folders.adapted(), tmp_path)
    inlay.load(folders.base(), tmp_path)


def test_a_folder_that_is_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folders.saved(tmp_path / "link")
    assert len(os.listdir(tmp_path / "real")) == 2
    inlay.load(folders.base(), tmp_path / "link")


def test_a_base_with_a_large_tensor_is_told_from_another(tmp_path: Path) -> None:
    """2^25 elements, one layer of a 7B model: no float32 names its last place."""
    model, other = folders.base(), folders.base()
    for m in (model, other):
        m.register_buffer("large", torch.zeros(2**25, dtype=torch.uint8))
    inlay.attach(model, folders.STACK)
    inlay.save(model, tmp_path)
    inlay.load(other, tmp_path, "same")
    other.large[-1] = 1
    with pytest.warns(UserWarning, match="saved for another base: weights"):
        inlay.load(other, tmp_path, "changed")


# -- refused while saving ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_saved(value: float, tmp_path: Path) -> None:
    model = folders.adapted()
    with torch.no_grad():
        next(p for _, _, p in need_state(model).own_parameters())[0, 0] = value
    with refused(
        CheckpointError,
        r"the adapter has values that are not finite[\s\S]*fr/lora: 0\.down",
        model=model,
        folder=tmp_path,
    ):
        inlay.save(model, tmp_path / "new")


@pytest.mark.parametrize(
    "stack",
    [
        IA3(targets=["0"]),
        LoRA(rank=2, targets=["0", "1"]),
        folders.STACK.named("other"),
        folders.STACK + IA3(targets=["0"]),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_stack_is_not_replaced(stack: Any, tmp_path: Path) -> None:
    folders.saved(tmp_path)
    model = shaken(folders.base(), stack)
    with refused(
        CheckpointError,
        r"holds a checkpoint of another stack[\s\S]*overwrite=True",
        model=model,
        folder=tmp_path,
    ):
        inlay.save(model, tmp_path)
    inlay.save(model, tmp_path, overwrite=True)
    fresh = folders.base()
    inlay.load(fresh, tmp_path)
    assert torch.equal(output(model), output(fresh))


@pytest.mark.parametrize("content", [b"{}", b"", b"\x80\x04pickle", b'{"format": 99}'])
def test_a_manifest_that_cannot_be_read_is_not_replaced(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "inlay.json").write_bytes(content)
    model = folders.adapted()
    with refused(
        CheckpointError,
        r"holds an inlay\.json that cannot be read[\s\S]*overwrite=True",
        model=model,
        folder=tmp_path,
    ):
        inlay.save(model, tmp_path)
    inlay.save(model, tmp_path, overwrite=True)
    inlay.load(folders.base(), tmp_path)


def test_a_file_in_the_place_of_the_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "fr").write_text("a file")
    model = folders.adapted()
    for path in (tmp_path / "fr", tmp_path / "fr" / "deeper"):
        with refused(CheckpointError, "the checkpoint could not be written", model=model, folder=tmp_path):
            inlay.save(model, path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"x": object()}, "cannot be written as JSON"),
        ({"x": math.nan}, "cannot be written as JSON"),
        ({"x": torch.zeros(1)}, "cannot be written as JSON"),
        ({"x": {1, 2}}, "cannot be written as JSON"),
        ({"x": "y" * 5000}, "a string of 5,000 characters"),
        ({"x": 2**63}, "an integer of more than 63 bits"),
        ({"x": [0] * 100_001}, "a list of 100,001 items"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_what_could_not_be_loaded_again_is_not_saved(data: Any, match: str, tmp_path: Path) -> None:
    model = folders.adapted()
    need_state(model).placed[0].adapter.data.update(data)
    with refused(CheckpointError, match, model=model, folder=tmp_path):
        inlay.save(model, tmp_path / "new")


def test_a_stack_longer_than_a_checkpoint_holds_is_not_saved(tmp_path: Path) -> None:
    model = folders.base()
    for number in range(65):
        inlay.attach(model, IA3(targets=["0"]), f"a{number}")
    with refused(CheckpointError, "65 parts, 1 to 64 are read", model=model, folder=tmp_path):
        inlay.save(model, tmp_path)
    inlay.save(model, tmp_path, "a0")


def test_data_of_the_method_comes_back(tmp_path: Path) -> None:
    model = folders.adapted()
    data = {"größe": [1, 2.5, None, True, {"ä": "\u202e\x1b[31m"}], "n": 1e-300}
    need_state(model).placed[0].adapter.data.update(data)
    inlay.save(model, tmp_path)
    assert (tmp_path / "inlay.json").read_bytes().isascii()  # nothing in it moves a terminal's cursor
    fresh = folders.base()
    inlay.load(fresh, tmp_path)
    assert need_state(fresh).placed[0].adapter.data == data
    assert json.loads((tmp_path / "inlay.json").read_text())["parts"][0]["data"] == data
    assert listing(tmp_path)
