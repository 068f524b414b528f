"""Each plugin alone beside core, from built wheels, in a fresh environment.

The environment is a real venv. What is not ours (torch, transformers, …) is not installed again:
its packages are linked into the venv from the one that runs the tests, and ours are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = sorted(p.parent.name for p in (ROOT / "plugins").glob("*/pyproject.toml"))
FIRST = "lora"
Environment = Callable[..., Path]

# Every method of the one plugin, on a small model with biases, norms and rotary positions.
USE = """
import json, sys, torch, inlay
from inlay.testing.models import batch_for, build

done = []
for name, origin in inlay.methods().items():
    if origin.distribution != sys.argv[1]:
        continue
    model, fresh = build("qwen"), build("qwen")
    batch = batch_for(model)
    inlay.attach(model, name, name="a", data=[batch_for(model, labels=True)] * 2)
    with torch.no_grad():
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.add_(0.05)
        inlay.save(model, f"saved/{name}")
        inlay.load(fresh, f"saved/{name}", name="b")
        base = build("qwen")(**batch).logits
        assert not torch.equal(model(**batch).logits, base), name
        assert torch.equal(model(**batch).logits, fresh(**batch).logits), name
    done.append(name)
print(json.dumps([done, sorted(inlay.methods())]))
"""


def project(folder: Path) -> dict[str, object]:
    return dict(tomllib.loads((folder / "pyproject.toml").read_text())["project"])


def offered(plugin: str) -> set[str]:
    """Return the methods that a plugin's pyproject offers."""
    points = project(ROOT / "plugins" / plugin)["entry-points"]
    return set(points["inlay.methods"])  # type: ignore[index, call-overload]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that builds wheels of the checkout's packages, each once."""
    folder = tmp_path_factory.mktemp("wheels")
    built: set[Path] = set()

    def build(*packages: Path) -> Path:
        for package in packages:
            if package not in built:
                command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
                subprocess.run(command, cwd=package, check=True, capture_output=True)
                built.add(package)
        return folder

    return build


@pytest.fixture
def environment(tmp_path: Path, wheels: Callable[..., Path]) -> Environment:
    """Return a function that makes a venv with these of our packages; pip may take others from wheels."""

    def make(*packages: Path) -> Path:
        folder = wheels(*packages)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
        python = tmp_path / "env" / "bin" / "python"
        link_others(Path(sysconfig.get_paths()["purelib"]), python)
        names = [str(project(package)["name"]) for package in packages]
        pip(python, folder, "install", *names)
        return python

    return make


def link_others(source: Path, python: Path) -> None:
    """Link every installed package that is not ours into the venv of `python`."""
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    target = Path(output(python, "-c", where).strip())
    for entry in source.iterdir():
        if "inlay" not in entry.name and entry.suffix != ".pth" and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)


def pip(python: Path, wheels: Path, *arguments: str) -> None:
    """Run pip as a user would, with the folder of wheels as its only index."""
    output(python, "-m", "pip", *arguments, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))


def output(python: Path, *arguments: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "INLAY_"))}
    done = subprocess.run(
        [str(python), *arguments], cwd=python.parents[1], env={**clean, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_alone(plugin: str, environment: Environment) -> Path:
    """Install core and one plugin; every method of it attaches, saves and loads, and no other is there."""
    python = environment(ROOT, ROOT / "plugins" / plugin)
    done, all_methods = json.loads(output(python, "-W", "error", "-c", USE, f"inlay-{plugin}"))
    assert set(done) == offered(plugin)
    assert set(all_methods) == offered(plugin) | {"trained"}
    return python


def test_a_plugin_alone_from_its_wheel_and_absent_ones_by_the_command_that_installs_them(
    environment: Environment, wheels: Callable[..., Path]
) -> None:
    """LoRA's package alone, then the command line beside it, then what the command line says is missing."""
    python = check_alone(FIRST, environment)
    folder = wheels(ROOT / "contrib" / "train", ROOT / "plugins" / "prefix")
    pip(python, folder, "install", "inlay-train")
    inlay = python.with_name("inlay")
    listing = json.loads(output(inlay, "methods", "--json"))
    assert {entry["method"] for entry in listing["installed"]} == offered(FIRST) | {"trained"}
    known = {entry["method"]: entry["install"] for entry in listing["known"]}
    absent = {
        method: f"inlay-{plugin}" for plugin in PLUGINS if plugin != FIRST for method in offered(plugin)
    }
    assert known == {method: f"pip install {package}" for method, package in absent.items()}
    pip(python, folder, *known["prefix_tuning"].removeprefix("pip ").split())
    listing = json.loads(output(inlay, "methods", "--json"))
    assert offered("prefix") <= {entry["method"] for entry in listing["installed"]}


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [p for p in PLUGINS if p != FIRST])
def test_each_other_plugin_alone_from_its_wheel(plugin: str, environment: Environment) -> None:
    check_alone(plugin, environment)
