"""The demo end to end on a few docstrings: its story, its checks, its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

import inlay
from inlay import InlayError
from inlay_train import data, demo, encoder
from inlay_train.demo import HEAD, LORA, NAME, PREFIX, Recipe, Report
from inlay_train.encoder import Encoded, logits
from inlay_train.learning import head_only

SHORT = Recipe(stacks=(HEAD, LORA, PREFIX), steps=3, most=8, processes=2)
pytestmark = pytest.mark.xdist_group("demo")  # one process runs the demo for all of them


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    console = Console(record=True, width=200, quiet=False)
    report = demo.run(folder, SHORT, console)
    return report, console.export_text(), folder


@pytest.fixture(scope="module")
def held() -> Encoded:
    return encoder.encode(data.split(data.docstrings(SHORT.most))[1])


def test_the_story_is_told(told: tuple[Report, str, Path]) -> None:
    report, story, folder = told
    for line in (
        "48 docstrings to learn from, 16 held out",
        "22.7 M parameters",
        f"right before anything is learnt: {report.before:.1%}",
        "then 3 steps of 16 texts on from the fitted head",
        f"head, seed 0: accuracy {100 * report.head_only:.1f}",
        f"{PREFIX}, seed 0: accuracy",
        "accuracy in %, 1 seed",
        f"On with the best of them, {report.best}",
        "16 of 16 predictions identical, logits equal bit for bit",
        f"merged {', '.join(report.merged_parts)} at",
        f"{folder / 'report.json'}  all figures",
    ):
        assert line in story, line
    assert report.best in (LORA, PREFIX)


def test_the_checks_were_made(told: tuple[Report, str, Path]) -> None:
    report, story, _ = told
    assert report.loaded_bit_identical
    merged = ("docstrings/lora", "docstrings/trained")
    assert report.merged_parts == (merged if report.best == LORA else merged[1:])
    assert 0 <= report.merged_difference < 1e-5
    left = "nothing" if report.best == LORA else "docstrings/p_tuning_v2"
    assert f"still attached: {left}" in story


def test_the_files_say_the_same(told: tuple[Report, str, Path]) -> None:
    report, _, folder = told
    content = json.loads((folder / "report.json").read_text())
    rows = {row["stack"]: row for row in content["rows"]}
    assert content["report"]["after"] == report.after == rows[report.best]["mean"]
    assert content["recipe"]["steps"] == SHORT.steps
    assert rows.keys() == set(SHORT.stacks)
    assert rows[HEAD]["mean"] == report.head_only
    assert rows[HEAD]["rate"] is None
    assert rows[LORA]["parameters"] == 331_776 + 8 * 384 + 8
    assert rows[LORA]["merges"] == "yes"
    assert rows[PREFIX]["merges"] == "no"
    assert len(rows[PREFIX]["losses"]) == SHORT.steps
    assert {f.name for f in folder.iterdir()} == {
        "adapter", "comparison.html", "curves.png", "report.json", "runs", "share.png", "time.png",
    }  # fmt: skip


def test_the_saved_adapter_does_what_was_reported(told: tuple[Report, str, Path], held: Encoded) -> None:
    report, _, folder = told
    model = encoder.load(seed=5)
    bare = logits(model, held)
    inlay.load(model, folder / "adapter")
    adapted = logits(model, held)
    assert encoder.accuracy(adapted, held) == report.after
    assert (adapted - bare).norm() > 0.1 * bare.norm()


@pytest.mark.slow
def test_another_run_in_the_same_folder_gives_the_same_to_the_bit(told: tuple[Report, str, Path]) -> None:
    report, _, folder = told
    before = {f.name for f in (folder / "adapter").iterdir()}
    again = demo.run(folder, SHORT, Console(quiet=True))
    again.seconds = report.seconds
    assert again == report
    assert {f.name for f in (folder / "adapter").iterdir()} == before


def test_all_are_every_installed_method_and_lora_beside_a_prefix() -> None:
    stacks = demo.every_stack()
    assert stacks[: len(demo.STACKS)] == demo.STACKS
    assert f"{LORA} + {PREFIX}" in stacks
    installed = {name for name, origin in inlay.methods().items() if origin.version}
    assert {name for name in installed if any(name in stack for stack in stacks)} == installed - {"trained"}
    assert len(set(stacks)) == len(stacks)


def test_a_difference_after_loading_or_merging_is_an_error(
    told: tuple[Report, str, Path], held: Encoded
) -> None:
    report, _, folder = told
    model = encoder.load(seed=5)
    inlay.load(model, folder / "adapter", NAME)
    wrong = logits(model, held) + torch.tensor([1.0, *[0.0] * 7])
    quiet = Console(quiet=True)
    with pytest.raises(InlayError, match=r"the loaded model does not do .*\n.*up to 1\.0e\+00"):
        demo.load_into_fresh(folder / "adapter", SHORT, held, wrong, report, quiet)
    with pytest.raises(InlayError, match="the merged model does not do what the trained one does"):
        demo.merge_and_check(model, held, wrong, report, quiet)


def test_an_output_that_is_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InlayError, match=r"the output is not a folder\n.*taken"):
        demo.run(tmp_path / "taken", SHORT, Console(quiet=True))


def test_an_encoder_that_is_not_installed_is_named() -> None:
    with pytest.raises(
        InlayError, match=r"not installed\n.*no package no-such-encoder\n.*--no-deps no-such-encoder"
    ):
        encoder.folder("no-such-encoder")


def test_batches_hold_every_text_once_and_pad_to_the_longest(held: Encoded) -> None:
    batches = list(held.epoch(3, torch.Generator().manual_seed(0)))
    assert sorted(i for indices in batches for i in indices) == list(range(len(held)))
    assert len(batches) == 6
    batch = held.batch([0, 1, 2])
    lengths = [len(held.rows[i]) for i in range(3)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"].shape == (3, max(lengths))
    assert batch["input_ids"][1, : lengths[1]].tolist() == list(held.rows[1])


def test_outputs_come_in_the_order_of_the_texts(held: Encoded) -> None:
    lengths = held.through(lambda **batch: batch["attention_mask"].sum(1))
    assert lengths.tolist() == [len(row) for row in held.rows]


def test_the_head_alone_is_fitted_to_the_end() -> None:
    features, labels = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    head = head_only(features, labels, classes=4, decay=1e-2)
    loss = cross_entropy(head(features), labels) + 1e-2 * head.weight.square().sum()
    gradient = torch.autograd.grad(loss, list(head.parameters()))
    assert max(float(g.abs().max()) for g in gradient) < 1e-4
    assert float(loss.detach()) < 0.98 * float(torch.tensor(4.0).log())
