"""`inlay methods`: what is installed and what is known, fast, from metadata alone."""

from __future__ import annotations

import json
import os
import re
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inlay_train import known
from inlay_train.cli import app

TRAIN = Path(known.__file__).parents[1]
MOST, TRIES = 0.3, 8
LISTING = """
import sys
sys.argv = ["inlay", "methods", "--json"]
from inlay_train.__main__ import main
main()
print([m for m in ("torch", "inlay", "transformers", "typer", "rich") if m in sys.modules])
"""


def script() -> str:
    return str(Path(sys.executable).with_name("inlay"))


def test_the_whole_process_takes_less_than_the_time_promised() -> None:
    """The best of several runs; on a machine with more to do than it has cores, in CPU time."""
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    best = float("inf")
    for _ in range(TRIES):
        start = cpu_time() if busy else time.perf_counter()
        subprocess.run([script(), "methods"], capture_output=True, check=True)
        best = min(best, (cpu_time() if busy else time.perf_counter()) - start)
    assert best < MOST


def cpu_time() -> float:
    """Return the CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_installed_methods_are_listed_and_nothing_heavy_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", LISTING], capture_output=True, text=True, check=True)
    content, heavy = done.stdout.splitlines()
    installed = {entry["method"]: entry for entry in json.loads(content)["installed"]}
    assert installed["lora"] == {
        "method": "lora", "package": "inlay-lora", "version": "0.1.0", "install": None,
        "what": "A trainable low-rank matrix beside each frozen weight.",
    }  # fmt: skip
    assert installed["p_tuning_v2"]["package"] == "inlay-prefix"
    assert heavy == "[]"


def without_packages(folder: Path | None = None, *options: str) -> str:
    """Run the command where nothing is installed but what is in `folder` (-S leaves out the rest)."""
    path = os.pathsep.join(map(str, filter(None, (TRAIN, folder))))
    done = subprocess.run(
        [sys.executable, "-S", "-m", "inlay_train", "methods", *options],
        env={"PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_what_is_not_installed_is_named_with_the_command_that_installs_it() -> None:
    text = without_packages()
    assert text.startswith("no method is installed")
    rows = [re.split(r" {2,}", line) for line in text.splitlines()]
    assert ["prefix_tuning", "pip install inlay-prefix"] in [row[:2] for row in rows]
    content = json.loads(without_packages(None, "--json"))
    assert content["installed"] == []
    assert {(e["method"], e["install"]) for e in content["known"]} >= {("dora", "pip install inlay-lora")}


def package(folder: Path, name: str, methods: str, summary: str = "") -> None:
    """Make a real installed package's metadata."""
    info = folder / f"{name.replace('-', '_')}-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\nSummary: {summary}\n")
    (info / "entry_points.txt").write_text(f"[inlay.methods]\n{methods}\n")


def test_a_strangers_package_is_listed_with_its_own_summary(tmp_path: Path) -> None:
    package(tmp_path, "acme-methods", "sparkle = acme:Sparkle", "Sparkles \x1b[31mred")
    text = without_packages(tmp_path)
    assert "sparkle  acme-methods  2.0      Sparkles \\x1b[31mred" in text


def test_a_method_offered_twice_is_told(tmp_path: Path) -> None:
    package(tmp_path, "acme-methods", "lora = acme:LoRA")
    package(tmp_path, "other-methods", "lora = other:LoRA")
    text = without_packages(tmp_path)
    assert "lora is offered by acme-methods and other-methods: uninstall one of them" in text
    absent = [line for line in text.splitlines() if "pip install inlay-lora" in line]
    assert any(line.startswith("dora ") for line in absent)  # its package is still absent
    assert not any(line.startswith("lora ") for line in absent)


def test_the_environments_choice_of_packages_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAY_LOAD_PLUGINS", "inlay-lora")
    assert "INLAY_LOAD_PLUGINS='inlay-lora' lets inlay use these packages only" in known.listing()


def test_the_program_and_the_shortcut_print_the_same() -> None:
    for options in ([], ["--json"]):
        direct = subprocess.run([script(), "methods", *options], capture_output=True, text=True, check=True)
        assert CliRunner().invoke(app, ["methods", *options]).output == direct.stdout


def test_an_unknown_option_is_an_error() -> None:
    done = subprocess.run([script(), "methods", "--jsn"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No such option" in done.stderr


def test_the_list_of_known_methods_is_current() -> None:
    """If this fails: run `python contrib/train/tools/known_methods.py`."""
    tool = runpy.run_path(str(TRAIN / "tools" / "known_methods.py"))
    assert known.FILE.read_text(encoding="utf-8") == tool["text"]()
    assert {"lora", "prefix_tuning", "trained"} <= set(tool["known"]())


def test_the_command_reference_is_current() -> None:
    """If this fails: run `python contrib/train/tools/command_reference.py`."""
    tool = runpy.run_path(str(TRAIN / "tools" / "command_reference.py"))
    assert tool["FILE"].read_text(encoding="utf-8") == tool["text"]()
    assert "## inlay methods" in tool["text"]()
