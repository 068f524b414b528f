"""Journal: a JSON line for every part that is attached, loaded or merged, and for every failure to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inlay.authoring import Adapter, Method, hookimpl
from inlay.errors import ConfigError

VARIABLE = "INLAY_JOURNAL"


class Journal:
    """An observer that appends to the file `path`, or to the one INLAY_JOURNAL names.

    It wraps hooks and answers none. A dry run (`inlay.plan`, the trial of a checkpoint) has no
    adapter's name yet and is not noted.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        given = path or os.environ.get(VARIABLE)
        if not given:
            raise ConfigError(
                "the journal does not know its file",
                saw=f"no path, and {VARIABLE} is not set",
                do=f"set {VARIABLE}, or observe Journal(path)",
            )
        self.path = Path(given)
        try:
            self.path.open("a").close()
        except OSError as error:
            raise ConfigError(
                "the journal cannot be written", saw=f"{error}", do="name a file in a folder that exists"
            ) from error

    @hookimpl(wrapper=True)
    def inject(self, method: Method, adapter: Adapter) -> Generator[None, Any, Any]:
        """Note an attached or loaded part."""
        if not adapter.path:
            return (yield)
        return (yield from self._noted("load" if adapter.filled else "attach", method, adapter))

    @hookimpl(wrapper=True)
    def merge(self, method: Method, adapter: Adapter) -> Generator[None, Any, Any]:
        """Note a part whose folds were asked for."""
        return (yield from self._noted("merge", method, adapter))

    def _noted(self, event: str, method: Method, adapter: Adapter) -> Generator[None, Any, Any]:
        """Run the hook inside, then write what happened."""
        start, failure = time.perf_counter(), None
        try:
            return (yield)
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._write(
                time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                event=event,
                adapter=adapter.path,
                method=method.id,
                settings=method.to_dict(),
                sites=len(adapter.sites),
                parameters=sum(p.numel() for _, p in adapter.named_parameters()),
                seconds=round(time.perf_counter() - start, 6),
                error=failure,
            )

    def _write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
