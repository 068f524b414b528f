"""Roles are found in every model type of transformers' auto classes, or the reason is listed here.

On the meta device, from default configurations with few layers; and, where a tiny model of the type
runs, with an adapter on everything found: it acts, learns everywhere, merges and leaves no trace.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import proof
import pytest
import survey

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("models")]  # ten minutes

# Of these an attention and a feed-forward part exist, and were not found: the shortfall.
NOT_FOUND = {
    **dict.fromkeys(["ibert", "squeezebert"], "its layers are of classes of its own"),
    **dict.fromkeys(["mobilevitv2", "levit", "swiftformer"], "its attention is convolutional"),
    "axk2": "its queries come from a latent beside a gate",
    "deepseek_v4": "keys and values are one",
    "jetmoe": "its attention is a mixture of experts",
    "moshi": "its layers hold one matrix a codebook",
    "xlnet": "its projections are bare parameters",
    "zaya": "its values come from two layers",
}  # fmt: skip
WITHOUT = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm", "fnet", "bit", "convnext", "convnextv2",
           "efficientnet", "focalnet", "hgnet_v2", "mobilenet_v1", "mobilenet_v2", "poolformer", "pp_lcnet",
           "regnet", "resnet", "textnet"}  # fmt: skip


@pytest.fixture(scope="module")
def everything() -> list[survey.Found]:
    return list(survey.everything())


@pytest.fixture(scope="module")
def proofs(everything: list[survey.Found]) -> list[proof.Proof]:
    return [proof.prove(f.kind, f.type, f.task) for f in everything if not f.unbuilt]


def test_roles_are_found_or_the_reason_is_listed(everything: list[survey.Found]) -> None:
    built = [found for found in everything if not found.unbuilt]
    assert len(built) > 390
    missing = {found.type for found in built if found.missing}
    assert missing == set(NOT_FOUND) | WITHOUT
    asked = [found for found in built if found.type not in WITHOUT]
    share = sum(not found.missing for found in asked) / len(asked)
    assert share >= 0.95, share


def test_what_is_found_in_models_that_run_is_what_it_is_called(proofs: list[proof.Proof]) -> None:
    shown = [p for p in proofs if p.sites]
    assert len(shown) > 300
    assert {p.kind: p.wrong for p in shown if p.wrong} == {}
    assert max(p.error for p in shown) < 1e-3


def test_a_found_role_is_one_a_method_can_act_on(everything: list[survey.Found]) -> None:
    for found in everything:
        if not found.unbuilt and not found.missing:
            assert found.methods["lora"], found.kind
            assert found.methods["ia3"], found.kind


def test_the_page_is_made_from_this_run(everything: list[survey.Found], proofs: list[proof.Proof]) -> None:
    spec = importlib.util.spec_from_file_location("models_page", ROOT / "docs" / "tools" / "models.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert PAGE.read_text() == tool.page(
        everything, proofs, {**NOT_FOUND, **dict.fromkeys(WITHOUT, tool.NONE)}
    )
