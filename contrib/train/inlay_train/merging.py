"""Merging a checkpoint into its base, written as a folder that transformers loads by itself."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from torch import nn

import inlay
from inlay import CannotMerge, InlayError
from inlay.errors import CheckpointError, RegistryError
from inlay.identity import differences
from inlay.manifest import MAX_BYTES
from inlay_train import base
from inlay_train.checkpoints import Saved, read
from inlay_train.folder import TASK
from inlay_train.refusal import check_new

TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json",
             "chat_template*", "preprocessor_config.json", "processor_config.json")  # fmt: skip
MAX_LABELS = 100_000


@dataclass(frozen=True)
class Merged:
    """What was written: the folded parts, how far the folded layers are from the adapted ones, and what
    storing their weights in few bits cost, in words."""

    output: str
    architecture: str
    parts: list[str]
    sites: int
    worst_error: float
    notes: list[str]
    cost: str = ""


def merged(
    folder: Path, model: str, output: Path, *, other_base: bool = False, quantised: str | None = None
) -> Merged:
    """Merge the checkpoint in `folder` into the base `model`, and write the result to `output`.

    `quantised` says how to merge into a base in few bits, as in `inlay.merge`.
    Everything that can be refused is refused before the output is touched.
    """
    check_new(output, do="choose another folder; nothing is overwritten")
    saved = read(folder)
    check_methods(saved)
    source = base.folder_of(model)
    kind = base.architecture(saved.base["architecture"], str(folder))
    config = _configuration(saved, source, kind)
    _name_labels(config, folder)
    module = _loaded(kind, source, config)
    notes = _check_base(saved, module, model, other_base=other_base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this adapter was saved for another base")  # told in the notes
        inlay.load(module, folder, name="saved", trainable=False)
    check_mergeable(module)
    report = inlay.merge(module, undo=False, quantised=quantised)
    write(module, source, output)
    parts = [part.name for part in saved.parts]
    return Merged(str(output), kind.__name__, parts, len(report.sites), report.worst, notes, cost(report))


def cost(report: inlay.MergeReport) -> str:
    """Say what storing merged weights in few bits cost at most; "" where no layer is quantised again."""
    lost = max((s.rounding for s in report.sites if s.quantised == "requantise"), default=0.0)
    return f"; storing in few bits cost up to {lost:.1e} of the change" if lost else ""


def check_methods(saved: Saved) -> None:
    """Raise if methods of the checkpoint are not installed, naming what installs them all."""
    if missing := saved.missing:
        packages = sorted({n.install.removeprefix("pip install ") for n in missing if n.install})
        raise RegistryError(
            "the checkpoint needs methods that are not installed",
            saw=", ".join(ascii(n.method)[1:100] for n in missing),
            do=f"pip install {' '.join(packages)} (the names come from the checkpoint: if you trust it)",
        )


def check_mergeable(module: nn.Module) -> None:
    """Refuse the whole merge if a part has no weight form, naming every such part."""
    stuck = [part for part in inlay.summary(module).parts if not part.mergeable]
    if stuck:
        raise CannotMerge(
            "parts of the checkpoint cannot be merged into weights",
            saw=", ".join(f"{part.path.partition('/')[2]} ({part.method})" for part in stuck),
            do="keep the checkpoint beside the base and use inlay.load, or train a stack without them",
        )


def write(module: Any, source: Path, output: Path) -> None:
    """Write the model and the base's tokenizer files; the folder appears complete or not at all."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise _unwritten(output, error) from error
    try:
        temporary.chmod(0o755)
        # transformers cannot turn what it read from few bits back into the names of an older format.
        options = {"save_original_format": False} if getattr(module, "hf_quantizer", None) else {}
        module.save_pretrained(temporary, **options)
        for file in sorted({f for pattern in TOKENIZER for f in source.glob(pattern) if f.is_file()}):
            shutil.copyfile(file, temporary / file.name)
        temporary.replace(output)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError)):
            raise _unwritten(output, error) from error
        raise


def _unwritten(output: Path, error: Exception) -> InlayError:
    return InlayError(
        "the merged model could not be written",
        saw=f"{str(output)!a}: {type(error).__name__}: {error}",
        do="make room or choose another folder; nothing was left there",
    )


def _configuration(saved: Saved, source: Path, kind: Any) -> Any:
    """Return the base's configuration with as many labels as the saved head has.

    Their number is no part of a base model's folder. It is the one, among the sizes of the saved
    tensors, with which the model has exactly the shapes that the checkpoint was made for.
    """
    config = base.configuration(source)
    trial: Any = base.skeleton(kind, config)
    wrong = _shapes(saved, trial)
    sizes = {shape[0] for part in saved.parts for shape in part.shapes.values() if shape}
    for labels in sorted(size for size in sizes if 0 < size <= MAX_LABELS) if wrong else ():
        changed = base.configuration(source, num_labels=labels)
        if not _shapes(saved, base.skeleton(kind, changed)):
            return changed
    if wrong:
        raise CheckpointError(
            "this checkpoint was made for a base of another shape",
            saw=f"{kind.__name__} of {str(source)!a}: {'; '.join(wrong)}",
            do="name the base model that it was trained on",
        )
    return config


def _name_labels(config: Any, folder: Path) -> None:
    """Give the classes the names that `inlay train` left beside the adapter, if it did."""
    file = folder / TASK
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
        return
    try:
        labels = json.loads(file.read_bytes())["labels"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    named = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if named and len(labels) == config.num_labels == len(set(labels)):
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}


def _shapes(saved: Saved, module: nn.Module) -> list[str]:
    return [d for d in differences(saved.base, module) if d.startswith(("architecture", "shapes"))]


def _loaded(kind: Any, source: Path, config: Any) -> nn.Module:
    try:
        module: nn.Module = kind.from_pretrained(source, config=config, local_files_only=True, dtype="auto")
    except Exception as error:  # transformers and safetensors raise whatever the files provoke
        raise InlayError(
            "the base's weights cannot be loaded",
            saw=f"{str(source)!a}: {type(error).__name__}: {str(error)[:300]}",
            do="name a complete model folder",
        ) from error
    return module.eval()


def _check_base(saved: Saved, module: nn.Module, model: str, *, other_base: bool) -> list[str]:
    """Refuse other weights than those trained on; return the lesser differences in words."""
    found = differences(saved.base, module)
    if any(d.startswith("weights") for d in found) and not other_base:
        raise CheckpointError(
            "the base's weights are not those the checkpoint was trained on",
            saw=f"{model!a}: other values, or tensors that its files lack",
            do="name the right base, or pass --other-base if that is meant",
        )
    return [ascii(d)[1:-1] for d in found]
