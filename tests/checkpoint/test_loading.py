"""Checkpoints that do not fit, are damaged, or ask for what is not here: refused, the model untouched."""

from __future__ import annotations

import math
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from folders import edit_tensors, manifest_of
from torch import Tensor, nn

import inlay
from inlay.errors import CheckpointError
from inlay.manifest import FILE, read_manifest
from inlay.stack import need_state
from inlay.testing.models import build
from inlay.testing.refusal import refused
from inlay.testing.snapshots import differences, snapshot
from inlay_lora import LoRA
from inlay_scaling import IA3

Spoil = Callable[[Path], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.saved(tmp_path / "fr")


def fresh() -> nn.Module:
    """Return a base that carries another adapter already: it must stay as it is too."""
    model = folders.base()
    inlay.attach(model, IA3(targets=["1"]), "before", seed=5)
    return model


def test_the_folder_that_all_tests_spoil_loads(folder: Path) -> None:
    model = fresh()
    assert inlay.load(model, folder, "fr") == 4
    with torch.no_grad(), inlay.use(model, "fr"):
        assert torch.equal(model(torch.ones(1, 64)), folders.adapted()(torch.ones(1, 64)))


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Spoil:
    return lambda folder: edit_tensors(folder, change)


def filled(value: float, dtype: torch.dtype = torch.float32) -> Spoil:
    def change(t: dict[str, Tensor]) -> None:
        t["0/1.up"] = t["0/1.up"].to(dtype)
        t["0/1.up"][3, 0] = value

    return tensors(change)


def cast(dtype: torch.dtype) -> Spoil:
    return tensors(lambda t: t.update({"0/0.down": t["0/0.down"].to(dtype)}))


TENSORS: dict[str, tuple[Spoil, str]] = {
    "one missing": (tensors(lambda t: t.pop("0/1.up")), r"lacks tensors of 'lora'[\s\S]*'1\.up' and 0 more"),
    "all missing": (tensors(lambda t: t.clear()), r"lacks tensors of 'lora'[\s\S]*and 3 more"),
    "one extra": (
        tensors(lambda t: t.update({"0/2.up": torch.zeros(1)})),
        r"has unknown tensors of 'lora'[\s\S]*'2\.up'",
    ),
    "one renamed": (tensors(lambda t: t.update({"0/1.uq": t.pop("0/1.up")})), "lacks tensors of 'lora'"),
    "transposed": (
        tensors(lambda t: t.update({"0/0.up": t["0/0.up"].T.contiguous()})),
        r"a tensor of the checkpoint has the wrong shape[\s\S]*\[1, 64\] in the file, \[64, 1\] here",
    ),
    "another rank": (
        tensors(lambda t: t.update({"0/0.down": torch.zeros(2, 64)})),
        r"wrong shape[\s\S]*\[2, 64\] in the file",
    ),
    "a scalar": (
        tensors(lambda t: t.update({"0/0.down": torch.zeros(())})),
        r"wrong shape[\s\S]*\[\] in the file",
    ),
    "empty": (
        tensors(lambda t: t.update({"0/0.down": torch.zeros(0, 64)})),
        r"wrong shape[\s\S]*\[0, 64\] in the file",
    ),
    "integers": (
        cast(torch.int64),
        r"a tensor of the checkpoint has the wrong dtype[\s\S]*'0\.down': torch\.int64 in the file",
    ),
    "truth values": (cast(torch.bool), r"wrong dtype[\s\S]*torch\.bool in the file"),
    "complex": (cast(torch.complex64), r"wrong dtype[\s\S]*'0\.down': C64"),
    "eight bits": (cast(torch.float8_e4m3fn), r"wrong dtype[\s\S]*F8_E4M3"),
    "NaN": (filled(math.nan), r"values that are not finite[\s\S]*'1\.up' of 'lora'"),
    "Inf": (filled(math.inf), "values that are not finite"),
    "-Inf": (filled(-math.inf, torch.bfloat16), "values that are not finite"),
    "finite only in float64": (
        filled(1e300, torch.float64),
        r"values that are not finite[\s\S]*as torch\.float32",
    ),
    "of no part": (
        tensors(lambda t: t.update({"1/0.up": torch.zeros(1)})),
        r"the tensor '1/0\.up' belongs to no part",
    ),
    "of part ²": (
        tensors(lambda t: t.update({"²/0.up": t.pop("0/0.up")})),
        r"the tensor '\\xb2/0\.up' belongs to no part",
    ),
    "of part 00": (
        tensors(lambda t: t.update({"00/0.up": t.pop("0/0.up")})),
        r"the tensor '00/0\.up' belongs to no part",
    ),
    "without a part": (
        tensors(lambda t: t.update({"up": t.pop("0/0.up")})),
        "the tensor 'up' belongs to no part",
    ),
    "nameless": (tensors(lambda t: t.update({"0/": t.pop("0/0.up")})), "the tensor '0/' belongs to no part"),
}


@pytest.mark.parametrize(("spoil", "match"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_are_refused(spoil: Spoil, match: str, folder: Path) -> None:
    spoil(folder)
    model = fresh()
    with refused(CheckpointError, match, model=model, folder=folder):
        inlay.load(model, folder, "fr")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_float_dtype_is_converted(dtype: torch.dtype, folder: Path) -> None:
    cast(dtype)(folder)
    model = fresh()
    assert inlay.load(model, folder, "fr") == 4
    assert {p.dtype for _, _, p in need_state(model).own_parameters()} == {torch.float32}


# -- damage --------------------------------------------------------------------------------------


def tensor_file(folder: Path) -> Path:
    return folder / manifest_of(folder)["tensors"]


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float, folder: Path) -> None:
    for file in (tensor_file(folder), folder / FILE):
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])
        model = fresh()
        with refused(CheckpointError, "the checkpoint is damaged or hostile", model=model, folder=folder):
            inlay.load(model, folder, "fr")
        file.write_bytes(data)
    inlay.load(fresh(), folder, "fr")


def test_a_flipped_bit_in_the_tensors_is_refused(folder: Path) -> None:
    file, model = tensor_file(folder), fresh()
    data, draw = bytearray(file.read_bytes()), random.Random(0)
    for _ in range(40):
        place = draw.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
        with refused(
            CheckpointError, r"damaged or hostile[\s\S]*(digest in its name|has a header of)", model=model
        ):
            inlay.load(model, folder, "fr")
        data[place // 8] ^= 1 << place % 8


def test_a_flipped_bit_in_the_manifest_is_refused_or_means_the_same(folder: Path) -> None:
    """Any bit: whitespace may change, what is read may not. Every byte of the file is tried."""
    file = folder / FILE
    data, whole, draw = bytearray(file.read_bytes()), read_manifest(folder), random.Random(0)
    same = 0
    for place in range(len(data)):
        bit = 1 << draw.randrange(8)
        data[place] ^= bit
        file.write_bytes(data)
        try:
            assert read_manifest(folder) == whole
            same += 1
        except CheckpointError:
            pass
        data[place] ^= bit
    assert same < len(data) / 4  # spaces and line ends


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_refused_and_not_opened(protocol: int, folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    data = pickle.dumps(Bomb(), protocol)
    model = fresh()
    (folder / FILE).rename(folder / "kept")
    (folder / FILE).write_bytes(data)
    with refused(CheckpointError, r"damaged or hostile[\s\S]*inlay\.json: ", model=model, folder=folder):
        inlay.load(model, folder, "fr")
    (folder / "kept").rename(folder / FILE)
    folders.put(folder, manifest_of(folder), data)
    with refused(CheckpointError, "damaged or hostile", model=model, folder=folder):
        inlay.load(model, folder, "fr")
    torch.save({"0/0.up": torch.zeros(1)}, folder / "checkpoint.pt")
    folders.put(folder, manifest_of(folder), (folder / "checkpoint.pt").read_bytes())
    with refused(CheckpointError, "damaged or hostile", model=model, folder=folder):
        inlay.load(model, folder, "fr")
    assert not (tmp_path / "ran").exists()


def test_what_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    model = fresh()
    for path in (tmp_path / "nowhere", folder / FILE, Path("\0")):
        with refused(CheckpointError, "there is no such checkpoint folder", model=model, folder=folder):
            inlay.load(model, path, "fr")
    for file in (tensor_file(folder), folder / FILE):
        file.unlink()
        with refused(
            CheckpointError, r"missing or not a regular file[\s\S]*check the path", model=model, folder=folder
        ):
            inlay.load(model, folder, "fr")


# -- another base --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        lambda: folders.base(32),
        lambda: nn.Sequential(*folders.base(), nn.Linear(64, 64)),
        lambda: nn.ModuleList(folders.base()),
        lambda: build("bert"),
    ],
    ids=["narrower", "longer", "another class", "a transformer"],
)
def test_a_base_of_another_shape_is_refused(other: Callable[[], nn.Module], folder: Path) -> None:
    model = other()
    with refused(
        CheckpointError, "this adapter was made for a base of another shape", model=model, folder=folder
    ):
        inlay.load(model, folder, "fr")


def test_another_base_of_the_same_shape_is_warned_about_and_loaded(folder: Path) -> None:
    model = folders.base()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.warns(UserWarning, match="this adapter was saved for another base: weights: other values"):
        inlay.load(model, folder, "fr")
    assert need_state(model).names == ["fr"]


def test_a_warning_made_an_error_leaves_the_model_untouched(folder: Path) -> None:
    model = folders.base()
    with torch.no_grad():
        model[0].weight.mul_(2)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="saved for another base"):
            inlay.load(model, folder, "fr")
    assert not differences(before, model)


def test_the_same_architecture_with_another_configuration_is_warned_about(tmp_path: Path) -> None:
    model = build("llama")
    inlay.attach(model, LoRA(), "fr")
    inlay.save(model, tmp_path)
    other = build("llama")
    other.config.rms_norm_eps = 1e-3  # type: ignore[union-attr, assignment]
    with pytest.warns(UserWarning, match="another base: config: "):
        inlay.load(other, tmp_path, "fr")


def test_what_training_notes_in_a_classifiers_configuration_is_no_other_base(tmp_path: Path) -> None:
    """Its forward sets `problem_type` at its first labels; a fresh base has none yet."""
    model = build("bert")
    inlay.attach(model, LoRA(rank=2), train=("head",))
    model(input_ids=torch.ones(2, 3, dtype=torch.long), labels=torch.tensor([0, 1]))
    assert model.config.problem_type == "single_label_classification"
    inlay.save(model, tmp_path)
    same = build("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inlay.load(same, tmp_path)
