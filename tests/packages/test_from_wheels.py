"""Each plugin alone beside core, from built wheels, in a fresh environment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from environments import ROOT, Wheels, output, pip, project

PLUGINS = sorted(p.parent.name for p in (ROOT / "plugins").glob("*/pyproject.toml"))
FIRST = "lora"
Environment = Callable[..., Path]

# Every method of the one plugin, on a small model with biases, norms and rotary positions.
USE = """
import json, sys, torch, inlay
from inlay.testing.models import batch_for, build

SMALL = {  # defaults are for wider layers
    "qa_lora": "qa_lora(rank=2, group=4)", "vblora": "vblora(vector_length=8)", "miss": "miss(rank=8)",
    "gralora": "gralora(rank=8)", "kadaptation": "kadaptation(n=8)", "road": "road(group_size=8)",
    "oft": "oft(block_size=8)", "intrinsic_said": "intrinsic_said(d=200)", "hiwi": "hiwi(target='weight')",
    "fourierft": "fourierft(n_frequency=100)", "randlora": "randlora(rank=8)",
    "waveft": "waveft(n_frequency=100)",
}
done = []
for name, origin in inlay.methods().items():
    if origin.distribution != sys.argv[1]:
        continue
    model, fresh = build("qwen"), build("qwen")
    batch = batch_for(model)
    inlay.attach(model, SMALL.get(name, name), name="a", data=[batch_for(model, labels=True)] * 2)
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


def offered(plugin: str) -> set[str]:
    """Return the methods that a plugin's pyproject offers."""
    return set(project(ROOT / "plugins" / plugin)["entry-points"]["inlay.methods"])


def check_alone(plugin: str, environment: Environment) -> Path:
    """Install core and one plugin; every method of it attaches, saves and loads, and no other is there."""
    python = environment(ROOT, ROOT / "plugins" / plugin)
    done, all_methods = json.loads(output(python, "-W", "error", "-c", USE, f"inlay-{plugin}"))
    assert set(done) == offered(plugin)
    assert set(all_methods) == offered(plugin) | {"trained", "dense"}
    return python


def test_a_plugin_alone_from_its_wheel_and_absent_ones_by_the_command_that_installs_them(
    environment: Environment, wheels: Wheels
) -> None:
    """LoRA's package alone, then the command line beside it, then what the command line says is missing."""
    python = check_alone(FIRST, environment)
    folder = wheels.build(ROOT / "contrib" / "train", ROOT / "plugins" / "prefix")
    pip(python, folder, "install", "inlay-train")
    inlay = python.with_name("inlay")
    listing = json.loads(output(inlay, "methods", "--json"))
    assert {entry["method"] for entry in listing["installed"]} == offered(FIRST) | {"trained", "dense"}
    known = {entry["method"]: entry["install"] for entry in listing["known"]}
    absent = {
        method: f"inlay-{plugin.replace('_', '-')}"
        for plugin in PLUGINS
        if plugin != FIRST
        for method in offered(plugin)
    }
    assert known == {method: f"pip install {package}" for method, package in absent.items()}
    pip(python, folder, *known["prefix_tuning"].removeprefix("pip ").split())
    listing = json.loads(output(inlay, "methods", "--json"))
    assert offered("prefix") <= {entry["method"] for entry in listing["installed"]}


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [p for p in PLUGINS if p != FIRST])
def test_each_other_plugin_alone_from_its_wheel(plugin: str, environment: Environment) -> None:
    check_alone(plugin, environment)
