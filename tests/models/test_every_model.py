"""Roles are found in every model type of transformers' auto classes, or the reason is listed here.

On the meta device, from default configurations with few layers: the finding, not what then runs;
tests/models/test_fused.py shows for fused layers that what is found is what it is called.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import survey

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
pytestmark = pytest.mark.slow  # two minutes

EXPERTS = "all experts' weights are one 3-D parameter"
HYBRID = "its default configuration has no attention within the first layers"
# Of these an attention and a feed-forward part exist, and were not found: the shortfall.
NOT_FOUND = {
    **dict.fromkeys(
        ["cohere2_moe", "flex_olmo", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoeshared",
         "inkling2_text", "inkling_text", "jetmoe", "mellum", "minimax", "minimax_m2", "mixtral", "olmoe",
         "phimoe", "qwen3_moe"],
        EXPERTS,
    ),
    **dict.fromkeys(["bamba", "granitemoehybrid", "nemotron_h"], HYBRID),
    **dict.fromkeys(["xlm", "flaubert"], "attentions and feed-forwards stand in lists of their own"),
    **dict.fromkeys(["ibert", "squeezebert"], "its layers are of classes of its own"),
    **dict.fromkeys(["mobilevitv2", "levit", "swiftformer"], "its attention is convolutional"),
    "axk2": "its queries come from a latent beside a gate",
    "deepseek_v4": "keys and values are one",
    "longcat_flash": "two latent attentions a block stand in lists",
    "moshi": "its layers hold one matrix a codebook",
    "reformer": "its attention is hashed",
    "xlnet": "its projections are bare parameters",
    "zaya": "its values come from two layers",
}  # fmt: skip
WITHOUT = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm", "fnet", "bit", "convnext", "convnextv2",
           "efficientnet", "focalnet", "hgnet_v2", "mobilenet_v1", "mobilenet_v2", "poolformer", "pp_lcnet",
           "regnet", "resnet", "textnet"}  # fmt: skip


@pytest.fixture(scope="module")
def everything() -> list[survey.Found]:
    return list(survey.everything())


def test_roles_are_found_or_the_reason_is_listed(everything: list[survey.Found]) -> None:
    built = [found for found in everything if not found.unbuilt]
    assert len(built) > 390
    missing = {found.type for found in built if found.missing}
    assert missing == set(NOT_FOUND) | WITHOUT
    asked = [found for found in built if found.type not in WITHOUT]
    share = sum(not found.missing for found in asked) / len(asked)
    assert share > 0.87, share  # the goal is 0.95; the experts are what lacks


def test_a_found_role_is_one_a_method_can_act_on(everything: list[survey.Found]) -> None:
    for found in everything:
        if not found.unbuilt and not found.missing:
            assert found.methods["lora"], found.kind
            assert found.methods["ia3"], found.kind


def test_the_page_is_made_from_this_run(everything: list[survey.Found]) -> None:
    spec = importlib.util.spec_from_file_location("models_page", ROOT / "docs" / "tools" / "models.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert PAGE.read_text() == tool.page(everything, {**NOT_FOUND, **dict.fromkeys(WITHOUT, tool.NONE)})
