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
from inlay_train.demo import NAME, Recipe, Report
from inlay_train.encoder import Encoded, logits
from inlay_train.learning import head_only

SHORT = Recipe(epochs=1, most=8)
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
        "lora: lora on 36 sites",
        "p_tuning_v2: p_tuning_v2 on 6 sites (6 attention)",
        "trained: trained on 1 sites (1 head)",
        "3/3",
        f"before: the model, its head new              │ {report.before:.1%}",
        f"head only: the frozen model, its head fitted │ {report.head_only:.1%}",
        f"after: the stack, on from that head          │ {report.after:.1%}",
        "16 of 16 predictions identical, logits equal bit for bit",
        "merged docstrings/lora, docstrings/trained at 37 sites",
        "still attached: docstrings/p_tuning_v2",
        f"{folder / 'report.json'}  these figures",
    ):
        assert line in story, line


def test_the_checks_were_made(told: tuple[Report, str, Path]) -> None:
    report, _, _ = told
    assert report.loaded_bit_identical
    assert report.merged_parts == ("docstrings/lora", "docstrings/trained")
    assert 0 < report.merged_difference < 1e-5


def test_the_files_say_the_same(told: tuple[Report, str, Path]) -> None:
    report, _, folder = told
    content = json.loads((folder / "report.json").read_text())
    assert content["report"]["after"] == report.after
    assert content["recipe"]["epochs"] == SHORT.epochs
    assert {p["method"] for p in json.loads((folder / "adapter" / "inlay.json").read_text())["parts"]} == {
        "lora", "p_tuning_v2", "trained",
    }  # fmt: skip


def test_the_saved_adapter_does_what_was_reported(told: tuple[Report, str, Path], held: Encoded) -> None:
    report, _, folder = told
    model = encoder.load(seed=5)
    bare = logits(model, held)
    inlay.load(model, folder / "adapter")
    adapted = logits(model, held)
    assert encoder.accuracy(adapted, held) == report.after
    assert (adapted - bare).norm() > 0.1 * bare.norm()


def test_another_run_gives_the_same_to_the_bit(told: tuple[Report, str, Path], tmp_path: Path) -> None:
    report, _, folder = told
    again = demo.run(tmp_path, SHORT, Console(quiet=True))
    again.seconds = report.seconds
    assert again == report
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {
        f.name for f in (folder / "adapter").iterdir()
    }


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
