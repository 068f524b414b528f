"""Wheels of the checkout's packages, and fresh environments to install them into.

An environment is a real venv. What is not ours (torch, transformers, …) is not installed again: its
packages are linked into the venv from the one that runs the tests, and ours are left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def project(folder: Path) -> dict[str, Any]:
    return dict(tomllib.loads((folder / "pyproject.toml").read_text())["project"])


class Wheels:
    """A folder of wheels of our packages, each built once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built: set[Path] = set()

    def build(self, *packages: Path) -> Path:
        """Build what is not there yet; return the folder."""
        for package in packages:
            if package not in self.built:
                command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(self.folder)]
                subprocess.run(command, cwd=package, check=True, capture_output=True)
                self.built.add(package)
        return self.folder


def environment(folder: Path, wheels: Wheels, *packages: Path) -> Path:
    """Make a venv with these of our packages; return its python. pip may take others from the wheels."""
    found = wheels.build(*packages)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    link_others(Path(sysconfig.get_paths()["purelib"]), python)
    pip(python, found, "install", *(project(package)["name"] for package in packages))
    return python


def link_others(source: Path, python: Path) -> None:
    """Link every installed package that is not ours into the venv of `python`.

    Nor quantisers: transformers imports them where they are installed, and their import warns.
    """
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    target = Path(output(python, "-c", where).strip())
    for entry in source.iterdir():
        ours = "inlay" in entry.name or entry.name.startswith(("torchao", "hqq"))
        if not ours and entry.suffix != ".pth" and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)


def pip(python: Path, wheels: Path, *arguments: str) -> None:
    """Run pip as a user would, with the folder of wheels as its only index."""
    output(python, "-m", "pip", *arguments, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))


def output(program: Path, *arguments: str, cwd: Path | None = None, **variables: str) -> str:
    """Run a program of an environment (there, by default) and return what it prints; fail if it does."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_", "INLAY_"))}
    done = subprocess.run(
        [str(program), *arguments], cwd=cwd or program.parents[1], env={**clean, **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout
