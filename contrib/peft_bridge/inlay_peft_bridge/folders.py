"""Folders from one format to the other: what `inlay convert` runs."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import inlay
from inlay.errors import CheckpointError
from inlay.manifest import read_manifest
from inlay_peft_bridge import base as bases
from inlay_peft_bridge import files
from inlay_peft_bridge.export import to_peft
from inlay_peft_bridge.load import TRAINED, from_peft
from inlay_peft_bridge.report import Report
from inlay_peft_bridge.table import for_config, for_method

NAME = "converted"


class PeftFolders:
    """The bridge named "peft"."""

    @staticmethod
    def read(folder: Path, output: Path, base: str) -> Report:
        """Write the peft checkpoint in `folder` as one of inlay's to the new folder `output`."""
        files.check_new(output)
        adapter = files.read_config(folder)
        converter = for_config(adapter)
        labels = bases.labels_of(adapter, files.read_tensors(folder))
        config = bases.configuration(base, **labels)
        kind = bases.class_for(config, adapter)
        model = bases.built(kind, config, base, weights=converter.needs_weights)
        report = from_peft(folder, model, NAME)
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            temporary.chmod(0o755)
            inlay.save(model, temporary, NAME)
            temporary.replace(output)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return report

    @staticmethod
    def write(folder: Path, output: Path, base: str) -> Report:
        """Write the checkpoint of inlay's in `folder` as one of peft's to the new folder `output`."""
        files.check_new(output)
        content = read_manifest(folder)
        methods = [p["method"] for p in content["parts"] if p["method"] != TRAINED]
        weights = any(for_method(method).needs_weights for method in methods)
        model = loaded(folder, content, base, weights)
        return to_peft(model, output, NAME)


def loaded(folder: Path, content: Any, base: str, weights: bool) -> Any:
    """Return the base with the checkpoint on it, with as many classes as its head has."""
    kind = bases.class_named(content["base"]["architecture"].rpartition(".")[2])
    wrong: CheckpointError | None = None
    for changes in ({}, *({"num_labels": n} for n in head_sizes(folder, content))):
        model = bases.built(kind, bases.configuration(base, **changes), base, weights=weights)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "this adapter was saved for another base")
                inlay.load(model, folder, NAME, trainable=False)
        except CheckpointError as error:
            wrong = wrong or error
        else:
            model.name_or_path = base  # type: ignore[assignment]
            return model
    assert wrong is not None
    raise wrong


def head_sizes(folder: Path, content: Any) -> list[int]:
    """Return how many classes a trained head in a checkpoint could have."""
    numbers = {str(n) for n, part in enumerate(content["parts"]) if part["method"] == TRAINED}
    shapes = files.shapes(folder / content["tensors"]) if numbers else {}
    return sorted({shape[0] for key, shape in shapes.items() if key.partition("/")[0] in numbers and shape})
