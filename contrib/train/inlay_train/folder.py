"""The output folder of a run: who writes to it, what the run is, and whether another may go on with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from inlay import InlayError
from inlay_train import processes

if TYPE_CHECKING:
    from inlay_train.prepare import Prepared

RUN, RESULT, TASK = "_run", "result.json", "task.json"  # the hub gets no file under a name with _ in front
BLOCK, BLOCKS = 1 << 16, 64
# What may change between a run and its resumption: where things are, and what does not touch the weights.
PATHS = ("data", "eval_data", "test_data", "output")
FREE = {"output", "keep", "eval_batch", "model", "data", "eval_data", "test_data", "encoding", "method"}


class Folder:
    """One output folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.own = path / RUN
        self.record = self.own / "run.json"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder and keep other runs out of it; raise if one is in it.

        Where no run came to begin, nothing of this stays.
        """
        made = not self.path.exists()
        try:
            self.own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InlayError(
                "the output folder cannot be made",
                saw=f"{self.path}: {error.strerror}",
                do="choose another --output",
            ) from error
        owner = self.own / "owner"
        lock = FileLock(self.own / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InlayError(
                "another run is writing to the output folder",
                saw=f"process {owner.read_text() if owner.exists() else '?'} in {self.path}",
                do="wait for it to end, or choose another --output",
            ) from error
        try:
            owner.write_text(str(os.getpid()))
            yield
        finally:
            lock.release()
            if not self.record.exists():
                shutil.rmtree(self.own)
                if made and not any(self.path.iterdir()):
                    self.path.rmdir()

    def saved(self) -> dict[str, Any] | None:
        """Return what the folder says of its run, or None if it holds none."""
        try:
            found = json.loads(self.record.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InlayError(
                "the folder's record of its run is damaged",
                saw=f"{self.record}: {error}",
                do="start anew in another folder",
            ) from error
        return dict(found)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the folder's run; none where there is no run, if `given` describes one."""
        found = self.saved()
        if found is None and not {"model", "data", "task", "method"} <= given.keys():
            raise InlayError(
                "there is no run to resume in the output folder",
                saw=str(self.path),
                do="check --output; to begin a run, give --model, --data, --task and --method",
            )
        return {} if found is None else dict(found["config"])

    def holds(self, prepared: Prepared, *, resume: bool) -> bool:
        """Return whether there is a run to go on with, this one; raise if there is another."""
        before = self.saved()
        if before is None:
            return False
        if not resume:
            raise InlayError(
                "the output folder holds a run already",
                saw=str(self.path),
                do="go on with it by --resume, or choose another --output",
            )
        if found := list(differences(before, record(prepared))):
            raise InlayError(
                "this is not the run in the output folder, so it cannot go on with it",
                saw="".join(f"\n  {line}" for line in found),
                do="resume with --output and --resume alone, or choose another --output",
            )
        return True

    def begin(self, prepared: Prepared) -> None:
        """Write down what the run is."""
        write(self.record, json.dumps(record(prepared), indent=1))


def record(prepared: Prepared) -> dict[str, Any]:
    """Return what decides a run's weights, as plain data."""
    config = prepared.config
    plain = config.plain | {"train": list(prepared.train)}
    plain |= {name: str(Path(plain[name]).resolve()) for name in PATHS if plain[name]}
    if Path(config.model).is_dir():
        plain["model"] = str(Path(config.model).resolve())
    tables = {"data": config.data, "eval_data": config.eval_data}
    return {
        "config": plain,
        "stack": prepared.parts,
        "processes": processes.count(),
        "base": base_digest(prepared.folder),
        "digests": {name: None if path is None else file_digest(path) for name, path in tables.items()},
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for everything in which a run is another one."""
    if before["base"] != now["base"]:
        yield f"model: other files than the run began with ({before['config']['model']})"
    for name, digest in now["digests"].items():
        if digest != before["digests"][name]:
            yield f"{name.replace('_', '-')}: another content than {before['config'][name] or 'none'} had"
    if before.get("processes", 1) != now["processes"]:
        yield f"processes: {before.get('processes', 1)} then, {now['processes']} now"
    if before["stack"] != now["stack"]:
        yield f"method: {before['config']['method']} then, {now['config']['method']} now"
    for name, value in now["config"].items():
        if name not in FREE and value != before["config"].get(name):
            yield f"{name.replace('_', '-')}: {before['config'].get(name)} then, {value} now"


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_digest(folder: Path) -> str:
    """Digest a model folder: names and sizes of its weights and settings, and samples of their content."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".txt", ".model"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(BLOCK, size // BLOCKS)):
                    file.seek(start)
                    digest.update(file.read(BLOCK))
    return digest.hexdigest()


def write(path: Path, text: str) -> None:
    """Replace a file as a whole, or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
