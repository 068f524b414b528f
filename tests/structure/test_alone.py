"""Core by itself: what it imports, that it runs without plugins, and that no file names a machine."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LATE = ("transformers", "accelerate", "bitsandbytes")
PLACES = re.compile(r"(?<![\w.$}~])/(?:work|root|home|tmp|Users)/|\.\./shared|\bpyenv\b")


def python(script: str, **environment: str) -> str:
    """Run a script in a process of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_inlay_imports_no_optional_library_and_no_plugin() -> None:
    script = "import inlay, sys, json; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    loaded = set(json.loads(python(script)))
    assert "torch" in loaded
    assert loaded & set(LATE) == set()
    assert {name for name in loaded if name.startswith("inlay_")} == set()


def test_listing_methods_imports_none_of_them() -> None:
    script = (
        "import inlay, sys; print(len(inlay.methods()), [m for m in sys.modules if m.startswith('inlay_')])"
    )
    count, _, loaded = python(script).strip().partition(" ")
    assert int(count) > 5
    assert loaded == "[]"


WITHOUT_PLUGINS = """
import sys, tempfile
from dataclasses import dataclass
import torch, inlay
from inlay.authoring import Method, OutputDelta, register

assert set(inlay.methods()) <= {"trained", "dense"}, inlay.methods()  # core's own

class Scale(OutputDelta):
    reads = frozenset({"y"})
    def __init__(self, site, init):
        super().__init__()
        self.scale = init.zeros(site.out_features)
    def forward(self, x, y, at):
        return self.scale * y
    def fold(self, weight, bias):
        gain = 1 + self.scale.to(weight.dtype)
        return weight * gain[:, None], None if bias is None else bias * gain

@register
@dataclass(frozen=True, kw_only=True)
class Local(Method):
    id = "local"
    def delta(self, site, init):
        return Scale(site, init)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
x = torch.randn(5, 4)
base = model(x)
inlay.attach(model, Local(targets=["0", "2"]), train=())
optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=0.1))
for _ in range(3):
    optimizer.zero_grad(); model(x).square().sum().backward()
    inlay.check_training(model, optimizer); optimizer.step()
adapted = model(x)
assert not torch.allclose(adapted, base, atol=1e-3)
with tempfile.TemporaryDirectory() as folder:
    inlay.save(model, folder)
    inlay.detach(model)
    assert torch.equal(model(x), base)
    inlay.load(model, folder)
assert torch.equal(model(x), adapted)
inlay.merge(model, undo=False)
assert torch.allclose(model(x), adapted, atol=1e-5)
assert type(model) is torch.nn.Sequential
print([m for m in sys.modules if m.startswith("inlay_")])
"""


def test_core_runs_with_no_plugin_installed() -> None:
    assert python(WITHOUT_PLUGINS, INLAY_LOAD_PLUGINS="").strip() == "[]"


def project_files() -> list[Path]:
    """Return every text file of the project: what git knows or would add, else all but build outputs."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        hidden = re.compile(r"(^|/)(\.(?!ci/)|__pycache__)")
        paths = [p for p in ROOT.rglob("*") if not hidden.search(p.relative_to(ROOT).as_posix())]
    kinds = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".yaml", ".cfg", ""}
    return [p for p in paths if p.is_file() and p.suffix in kinds]


def test_no_file_names_a_place_on_the_machine_that_built_it() -> None:
    paths = project_files()
    assert len(paths) > 60
    found = {}
    for path in paths:
        hit = PLACES.search(path.read_text(encoding="utf-8", errors="ignore"))
        if hit and path != Path(__file__).resolve():
            found[str(path.relative_to(ROOT))] = hit.group()
    assert found == {}
    assert PLACES.search("see /" + "work/main")


def test_no_benchmark_result_holds_a_host_name() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert results
    for path in results:
        content = json.loads(path.read_text())
        assert {"cores", "python", "torch"} <= content["machine"].keys(), path.name
        assert socket.gethostname() not in _strings(content), path.name


def _strings(value: object) -> set[str]:
    if isinstance(value, dict):
        return {s for k, v in value.items() for s in _strings(k) | _strings(v)}
    if isinstance(value, list):
        return {s for v in value for s in _strings(v)}
    return {value} if isinstance(value, str) else set()
