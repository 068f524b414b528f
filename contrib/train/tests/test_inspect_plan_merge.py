"""`inlay inspect`, `inlay plan` and `inlay merge` on real small models and real checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

import inlay
from inlay.manifest import FILE, digest_of, read_manifest
from inlay.testing.models import batch_for, build
from inlay_train.cli import app

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = sorted(p for p in (ROOT / "tests" / "checkpoint" / "hostile").iterdir() if p.is_dir())
LABELS = 5


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A headless encoder's folder, as a hub has them: it says nothing of labels."""
    folder = tmp_path_factory.mktemp("base")
    build("bert").bert.save_pretrained(folder)  # type: ignore[union-attr, operator]
    (folder / "tokenizer.json").write_text("{}")
    return folder


def save(base: Path, folder: Path, stack: str, train: Sequence[str] = ("head",)) -> Any:
    """Attach a stack to the base with a new head, change it, save it; return the adapted model."""
    torch.manual_seed(3)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=LABELS)
    inlay.attach(model, stack, name="a", train=train)
    with torch.no_grad():
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    inlay.save(model, folder)
    return model.eval()


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    save(base, tmp_path / "lora", "lora(rank=2, targets=['linear'])")
    return tmp_path / "lora"


@pytest.fixture
def stacked(base: Path, tmp_path: Path) -> Path:
    save(base, tmp_path / "stacked", "lora(rank=2).named('style') + prefix_tuning(length=3, hidden=8)")
    return tmp_path / "stacked"


# -- inspect -------------------------------------------------------------------------------------


def test_inspect_says_what_is_saved(stacked: Path) -> None:
    text = run("inspect", stacked)
    saved = json.loads(run("inspect", stacked, "--json"))
    head, style, prefix = saved["parts"]
    assert (style["name"], style["method"], style["settings"]["rank"]) == ("style", "lora", 2)
    assert prefix["needs"][0]["package"] == "inlay-prefix"
    assert prefix["needs"][0]["installed"] == inlay.methods()["prefix_tuning"].version
    assert head["shapes"] == {"classifier.weight": [LABELS, 32], "classifier.bias": [LABELS]}
    assert head["parameters"] == LABELS * 33
    assert saved["base"]["architecture"] == "BertForSequenceClassification"
    assert saved["digest"] in text
    assert "not installed" not in text
    assert f"{sum(p['parameters'] for p in saved['parts']):,} parameters" in text


IMPORTED = """
import sys
from inlay_train.cli import app
app(["inspect", sys.argv[1]], standalone_mode=False)
print([m for m in sys.modules if m in ("inlay_lora", "inlay_prefix")])
"""


def test_inspect_works_without_the_methods_packages(stacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAY_LOAD_PLUGINS", "inlay-prefix")
    text = run("inspect", stacked)
    assert "lora: pip install inlay-lora" in text
    assert "pip install inlay-prefix" not in text
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, str(stacked)], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of the first part in the manifest, and seal it again."""
    content = read_manifest(folder)
    content["parts"][0].update(changes)
    content["digest"] = digest_of(content)
    (folder / FILE).write_text(json.dumps(content))


def test_inspect_names_a_strangers_package_with_care(lora: Path) -> None:
    edit(lora, method="sparkle", distribution="acme-methods")
    assert "sparkle: pip install acme-methods (if you trust it: the checkpoint names it)" in run(
        "inspect", lora
    )
    edit(lora, method="sparkle", distribution="--extra-index-url=https://example.org x")
    assert "sparkle: the checkpoint does not say which package has it" in run("inspect", lora)


def test_inspect_names_the_methods_inside_a_composite(lora: Path) -> None:
    inner = {"method": "ssf", "settings": {}}
    edit(lora, method="gates", distribution="acme-methods", settings={"parts": [inner]})
    needs = json.loads(run("inspect", lora, "--json"))["parts"][0]["needs"]
    assert [n["method"] for n in needs] == ["gates", "ssf"]
    assert needs[1]["package"] == "inlay-scaling"


def test_inspect_refuses_what_is_no_checkpoint(lora: Path, tmp_path: Path) -> None:
    assert "there is no such checkpoint folder" in run("inspect", tmp_path / "none", status=1)
    (tmp_path / "empty").mkdir()
    assert "is missing or not a regular file" in run("inspect", tmp_path / "empty", status=1)
    text = run("inspect", tmp_path, status=1)
    assert "this folder holds checkpoints in folders of its own" in text
    assert f"name one of them: {tmp_path / 'lora'}" in text
    edit(lora, calibration=["seen"])
    assert "the calibration tensors are not those the manifest lists" in run("inspect", lora, status=1)


@pytest.mark.parametrize("folder", HOSTILE, ids=lambda p: p.name)
def test_inspect_survives_hostile_folders(folder: Path) -> None:
    """It prints or refuses; nothing in the file reaches the terminal unescaped."""
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code in (0, 1)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert all(c.isprintable() or c == "\n" for c in result.output)
    assert len(result.output) < 20_000


# -- plan ----------------------------------------------------------------------------------------


def test_plan_counts_what_attaching_does(base: Path) -> None:
    stack = "lora(rank=2) + prefix_tuning(length=3, hidden=8)"
    options = ("--task", "classification", "--labels", 3, "--train", "head")
    found = json.loads(run("plan", "--model", base, "--method", stack, *options, "--json"))
    attached = inlay.attach(build("bert"), stack, train=("head",))
    assert found["architecture"] == "BertForSequenceClassification"
    assert found["parameters"] == attached.parameters
    assert found["model_parameters"] == attached.model_parameters
    assert [p["sites"] for p in found["parts"]] == [[s.name for s in p.sites] for p in attached.parts]
    text = run("plan", "--model", base, "--method", stack, *options)
    assert f"together: {attached.parameters:,} parameters" in text
    assert "lora on 4 sites (2 query, 2 value)" in text


def test_plan_needs_no_weights_and_takes_the_models_own_class(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "config.json", tmp_path)
    found = json.loads(run("plan", "--model", tmp_path, "--method", "lora(rank=2)", "--json"))
    assert found["architecture"] == "BertModel"


def config(folder: Path, base: Path, **changes: Any) -> Path:
    content = {**json.loads((base / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_plan_refuses_models_it_cannot_know(base: Path, tmp_path: Path) -> None:
    def plan(model: object, *options: str) -> str:
        return run("plan", "--model", model, "--method", "lora", *options, status=1)

    assert "there is no such model here" in plan("someone/unknown-model")
    assert "the model's configuration cannot be read" in plan(tmp_path)
    assert "the model's configuration cannot be read" in plan(config(tmp_path, base, model_type="none-such"))
    own = config(tmp_path, base, model_type="own", auto_map={"AutoConfig": "own.Own"})
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    text = plan(own)
    assert "the model's configuration cannot be read" in text
    assert "it ran" not in text
    for name in ("OwnModel", "logging", "os.path", "PreTrainedModel.__init__"):
        text = plan(config(tmp_path, base, architectures=[name]))
        assert "the model's class is not one of transformers'" in text
        assert "--task (classification, causal-lm, seq2seq)" in text
    text = plan(base, "--task", "clasification")
    assert "there is no task 'clasification'" in text
    assert "did you mean 'classification'" in text
    assert "this model cannot be used for seq2seq" in plan(base, "--task", "seq2seq")


def test_plan_refuses_stacks_it_cannot_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(stack: str) -> str:
        return run("plan", "--model", base, "--method", stack, status=1)

    assert "did you mean 'rank'" in plan("lora(rnk=2)")
    assert "the text does not describe a stack" in plan("lora(rank=2")
    assert "no installed package offers the method 'none_such'" in plan("none_such")
    assert "did you mean 'query'" in plan("lora(targets=['qery'])")
    monkeypatch.setenv("INLAY_LOAD_PLUGINS", "")
    text = plan("lora(rank=2) + prefix_tuning + dora")
    assert "the stack needs methods that are not installed" in text
    assert "pip install inlay-lora inlay-prefix" in text


# -- merge ---------------------------------------------------------------------------------------

PLAIN = """
import sys, torch
from transformers import AutoModelForSequenceClassification
model, said = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(said.values()), said
torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
assert "inlay" not in sys.modules
"""


def test_a_merged_folder_loads_without_inlay_and_does_what_the_adapted_model_does(
    base: Path, tmp_path: Path
) -> None:
    model = save(base, tmp_path / "a", "lora(rank=2, targets=['linear']) + ia3")
    text = run("merge", tmp_path / "a", "--model", base, "--output", tmp_path / "new" / "merged")
    assert "trained + lora + ia3 folded in at" in text
    assert (tmp_path / "new" / "merged" / "tokenizer.json").read_text() == "{}"
    ids = batch_for(model)["input_ids"]
    torch.save(ids, tmp_path / "ids")
    files = [tmp_path / "new" / "merged", tmp_path / "ids", tmp_path / "logits"]
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, files)], check=True, capture_output=True)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
    torch.testing.assert_close(torch.load(files[2]), adapted, atol=1e-5, rtol=1e-4)


def test_merge_reports_as_json_and_fills_an_empty_folder(lora: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    report = json.loads(run("merge", lora, "--model", base, "--output", tmp_path / "out", "--json"))
    assert report["parts"] == ["trained", "lora"]
    assert report["sites"] == 2 * 6 + 1
    assert 0 < report["worst_error"] < 1e-3
    assert (tmp_path / "out" / "config.json").exists()


def refused(lora: Path, base: object, output: Path, *options: str) -> str:
    """Return what a refused merge says; nothing may be left beside or at the output."""
    before = sorted(output.parent.rglob("*"))
    text = run("merge", lora, "--model", base, "--output", output, *options, status=1)
    assert sorted(output.parent.rglob("*")) == before
    return text


def test_merge_refuses_what_has_no_weight_form_and_names_all_of_it(
    stacked: Path, base: Path, tmp_path: Path
) -> None:
    text = refused(stacked, base, tmp_path / "out")
    assert "parts of the checkpoint cannot be merged into weights" in text
    assert "saw: prefix_tuning (prefix_tuning)" in text


def test_merge_refuses_an_output_that_holds_anything(lora: Path, base: Path, tmp_path: Path) -> None:
    for output in (lora, lora / FILE):
        assert "the output is not a new or empty folder" in refused(lora, base, output)


def test_merge_refuses_an_output_that_cannot_be_written(lora: Path, base: Path, tmp_path: Path) -> None:
    assert "the merged model could not be written" in refused(lora, base, lora / FILE / "below")


def test_merge_refuses_another_base(lora: Path, base: Path, tmp_path: Path) -> None:
    wide, other = tmp_path / "wide", tmp_path / "other"
    build("bert", intermediate_size=40).bert.save_pretrained(wide)  # type: ignore[union-attr, operator]
    build("bert", seed=9).bert.save_pretrained(other)  # type: ignore[union-attr, operator]
    assert "was made for a base of another shape" in refused(lora, wide, tmp_path / "out")
    text = refused(lora, other, tmp_path / "out")
    assert "the base's weights are not those the checkpoint was trained on" in text
    run("merge", lora, "--model", other, "--output", tmp_path / "out", "--other-base")
    assert (tmp_path / "out" / "config.json").exists()


def test_merge_refuses_a_head_that_was_not_saved(base: Path, tmp_path: Path) -> None:
    """Without it, the merged model's head would be a new random one."""
    save(base, tmp_path / "a", "lora(rank=2)", train=())
    text = refused(tmp_path / "a", config_with_labels(base, tmp_path), tmp_path / "out")
    assert "the base's weights are not those" in text


def config_with_labels(base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "labelled"
    shutil.copytree(base, folder)
    return config(folder, base, id2label={str(i): f"L{i}" for i in range(LABELS)})


def test_merge_refuses_a_base_without_weights(lora: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "the base's weights cannot be loaded" in refused(lora, tmp_path / "bare", tmp_path / "out")
    shutil.copytree(base, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "the base's weights cannot be loaded" in refused(lora, tmp_path / "cut", tmp_path / "out")


def test_merge_names_what_is_not_installed(
    stacked: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INLAY_LOAD_PLUGINS", "")
    text = refused(stacked, base, tmp_path / "out")
    assert "the checkpoint needs methods that are not installed" in text
    assert "pip install inlay-lora inlay-prefix" in text


def test_merge_tells_a_lesser_difference_and_keeps_the_dtype(lora: Path, base: Path, tmp_path: Path) -> None:
    other = config_with_labels(base, tmp_path)
    config(other, base, layer_norm_eps=1e-6)
    result = CliRunner().invoke(
        app, ["merge", str(lora), "--model", str(other), "--output", str(tmp_path / "o")]
    )
    assert result.exit_code == 0, result.output
    assert "note: config:" in result.stderr
    stored = load_file(tmp_path / "o" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}


def test_merge_names_the_classes_as_the_training_did(lora: Path, base: Path, tmp_path: Path) -> None:
    names = ["person", "place", "number", "entity", "other"]
    expected = dict(enumerate(names))
    for number, labels in enumerate([names, names[:3], ["x"] * LABELS, [1] * LABELS, None]):
        (lora / "task.json").write_text(json.dumps({"labels": labels}))
        run("merge", lora, "--model", base, "--output", tmp_path / str(number))
        found = BertConfig.from_pretrained(tmp_path / str(number)).id2label
        assert found == (expected if labels == names else {n: f"LABEL_{n}" for n in range(LABELS)})
    (lora / "task.json").write_text("{")
    run("merge", lora, "--model", base, "--output", tmp_path / "last")
