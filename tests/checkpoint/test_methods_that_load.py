"""Older versions of methods are migrated and checked; methods that load badly are refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import folders
import pytest
import torch
from folders import edit, edit_tensors
from torch import Tensor, nn

import inlay
from inlay.authoring import Adapter, Method, hookimpl, setting
from inlay.errors import CheckpointError, InlayError, RegistryError
from inlay.registry import registry
from inlay.stack import need_state
from inlay.testing.refusal import refused
from inlay_lora import LoRA
from inlay_scaling import IA3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.saved(tmp_path / "fr")


def fresh() -> nn.Module:
    """Return a base that carries another adapter already: it must stay as it is too."""
    model = folders.base()
    inlay.attach(model, IA3(targets=["1"]), "before", seed=5)
    return model


# -- versions of a method ------------------------------------------------------------------------


@dataclass(frozen=True)
class Newer(LoRA):
    """Version 3 of a method: version 1 called its factors A and B, version 2 as now."""

    id: ClassVar[str] = "aging"
    version: ClassVar[int] = 3
    wrong: str = setting("")

    @staticmethod
    @hookimpl
    def migrate(method: Any, state: Any, from_version: int) -> Any:
        if method.wrong == "raises":
            raise KeyError("A")
        if method.wrong == "nothing":
            return None
        if method.wrong == "a list":
            return [*state]
        names = {"A": "down", "B": "up"} if from_version == 1 else {}
        moved = {
            ".".join([k.split(".")[0], names.get(k.split(".")[1], k.split(".")[1])]): t
            for k, t in state.items()
        }
        if method.wrong == "forgets":
            moved.popitem()
        if method.wrong == "not finite":
            moved["0.up"] = moved["0.up"] / 0
        return moved


@dataclass(frozen=True)
class Unmoved(LoRA):
    id: ClassVar[str] = "aging"
    version: ClassVar[int] = 3


@pytest.fixture
def aging() -> Iterator[None]:
    registry.register(Newer)
    yield
    registry.forget(Newer)


def aged(folder: Path, version: int, **settings: Any) -> None:
    names = {"down": "A", "up": "B"} if version == 1 else {}
    edit_tensors(
        folder,
        lambda t: [
            t.update({f"{k.rsplit('.', 1)[0]}.{new}": t.pop(k)})
            for k in list(t)
            if (new := names.get(k.rsplit(".", 1)[1]))
        ],
    )
    edit(
        folder,
        lambda m: m["parts"][0].update(
            method="aging", method_version=version, settings={"rank": 1, **settings}
        ),
    )


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_older_version_is_migrated(version: int, folder: Path, aging: None) -> None:
    aged(folder, version)
    model = folders.base()
    assert inlay.load(model, folder, "fr") == 4
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(model(x), folders.adapted()(x))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ("raises", r"cannot be built[\s\S]*KeyError"),
        ("nothing", "the hook 'migrate' gave no answer"),
        ("a list", "'migrate' gave an answer of the wrong type"),
        ("forgets", "lacks tensors of"),
        ("not finite", "values that are not finite"),
    ],
)
def test_what_migration_gives_is_checked_again(wrong: str, match: str, folder: Path, aging: None) -> None:
    aged(folder, 1, wrong=wrong)
    model = fresh()
    with refused(InlayError, match, model=model, folder=folder):
        inlay.load(model, folder, "fr")


@pytest.mark.parametrize("version", [4, 0, -1])
def test_a_version_from_elsewhere_is_refused(version: int, folder: Path, aging: None) -> None:
    aged(folder, version)
    model = fresh()
    match = rf"this version of 'aging' cannot read the checkpoint[\s\S]*by version {version}, installed is 3"
    with refused(CheckpointError, match, model=model, folder=folder):
        inlay.load(model, folder, "fr")


def test_a_version_that_cannot_be_migrated_is_refused(folder: Path) -> None:
    aged(folder, 2)
    registry.register(Unmoved)
    try:
        with refused(CheckpointError, "this version of 'aging' cannot read the checkpoint"):
            inlay.load(fresh(), folder, "fr")
    finally:
        registry.forget(Unmoved)


# -- methods that load badly ---------------------------------------------------------------------


class Base(LoRA):
    id: ClassVar[str] = "spoilt"


@pytest.fixture
def spoilt(folder: Path) -> Iterator[Callable[[type[Method]], Path]]:
    """Return a function that makes a folder of a checkpoint of the given class."""
    made: list[type[Method]] = []

    def make(kind: type[Method]) -> Path:
        made.append(registry.register(dataclass(frozen=True)(kind)))
        edit(folder, lambda m: m["parts"][0].update(method="spoilt", settings={"rank": 1}))
        return folder

    yield make
    for kind in made:
        registry.forget(kind)


def test_a_state_dict_of_copies_is_refused(spoilt: Callable[[type[Method]], Path]) -> None:
    class Copies(Base):
        @staticmethod
        @hookimpl
        def state_dict(method: Any, adapter: Adapter) -> dict[str, Tensor]:
            return {k: t.clone() for k, t in adapter.tensors().items()}

    model = fresh()
    with refused(
        RegistryError,
        "the state_dict of 'spoilt' gives copies, so nothing can be loaded into it",
        model=model,
    ):
        inlay.load(model, spoilt(Copies), "fr")


def test_what_a_method_raises_on_hostile_data_is_an_error_about_the_checkpoint(
    spoilt: Callable[[type[Method]], Path],
) -> None:
    class Reads(Base):
        @staticmethod
        @hookimpl
        def inject(method: Any, sites: Any, adapter: Adapter) -> int:
            return LoRA.inject(method, sites[: adapter.data["count"]], adapter)

    model, folder = fresh(), spoilt(Reads)
    for data, error in (({}, "KeyError"), ({"count": "\x1b[31m"}, "TypeError"), ({"count": []}, "TypeError")):
        edit(folder, lambda m, data=data: m["parts"][0].update(data=data))
        with refused(
            CheckpointError, rf"the part 'lora' of the checkpoint cannot be built[\s\S]*{error}", model=model
        ):
            inlay.load(model, folder, "fr")
    edit(folder, lambda m: m["parts"][0].update(data={"count": 2}))
    inlay.load(model, folder, "fr")


def test_settings_that_ask_for_more_than_the_file_holds_are_refused(
    spoilt: Callable[[type[Method]], Path],
) -> None:
    class Draws(Base):
        width: int = setting(1, least=1)

        @staticmethod
        @hookimpl
        def inject(method: Any, sites: Any, adapter: Adapter) -> int:
            LoRA.inject(method, sites, adapter)
            adapter.share("noise", adapter.init(shared="noise").module(lambda: nn.Linear(64, method.width)))
            return 1

        @staticmethod
        @hookimpl
        def state_dict(method: Any, adapter: Adapter) -> dict[str, Tensor]:
            return {k: t for k, t in adapter.tensors().items() if not k.startswith("shared.")}

    Draws.__annotations__ = {"width": "int"}
    folder, model = spoilt(Draws), fresh()
    edit(folder, lambda m: m["parts"][0]["settings"].update(width=10**9))
    with refused(
        CheckpointError, "the settings ask for 65,000,000,000 numbers that are not in the file", model=model
    ):
        inlay.load(model, folder, "fr")
    edit(folder, lambda m: m["parts"][0]["settings"].update(width=10))
    inlay.load(model, folder, "fr")


def test_calibration_tensors_are_checked(spoilt: Callable[[type[Method]], Path]) -> None:
    class Measured(Base):
        calibrates: ClassVar[bool] = True

        @staticmethod
        @hookimpl
        def calibrate(method: Any, model: Any, sites: Any, batches: Any) -> dict[str, Tensor]:
            return {"order": torch.tensor([1, 0])}

    folder, model = spoilt(Measured), fresh()
    edit(folder, lambda m: m["parts"][0].update(calibration=["order"]))
    with refused(CheckpointError, r"(?s)lacks tensors of '\w+, calibration'.*'order'", model=model):
        inlay.load(model, folder, "fr")
    edit_tensors(folder, lambda t: t.update({"0/calibration:order": torch.tensor([1, 0])}))
    inlay.load(model, folder, "right")
    assert need_state(model).adapter_of("right").calibration["order"].tolist() == [1, 0]
    edit_tensors(folder, lambda t: t.update({"0/calibration:order": torch.tensor([1.0, math.nan])}))
    with refused(CheckpointError, "values that are not finite", model=model):
        inlay.load(model, folder, "fr")
    edit(folder, lambda m: m["parts"][0].update(calibration=[]))
    with refused(CheckpointError, r"(?s)has unknown tensors of '\w+, calibration'.*'order'", model=model):
        inlay.load(model, folder, "fr")


def test_what_cannot_be_placed_is_refused_with_the_model_untouched(tmp_path: Path) -> None:
    """Everything about the file is right; the model has a patched layer."""
    folder = folders.saved(tmp_path / "fr")
    model = folders.base()
    model[1].forward = lambda x: x  # type: ignore[assignment]
    with refused(
        InlayError, "a module's forward has been replaced on the instance", model=model, folder=folder
    ):
        inlay.load(model, folder, "fr")
    del model[1].forward
    shutil.copytree(folder, tmp_path / "copy")
    inlay.load(model, tmp_path / "copy", "fr")
