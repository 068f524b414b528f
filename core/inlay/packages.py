"""When installed packages were last changed: what is read of their metadata holds until then."""

from __future__ import annotations

import os
import sys


def state_of_path() -> tuple[tuple[str, int], ...]:
    """Return each folder that packages are found in, with the time it last changed."""
    return tuple((path, _changed(path)) for path in sys.path)


def _changed(path: str) -> int:
    """Return when a folder of packages last changed; 0 if it is none."""
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0
