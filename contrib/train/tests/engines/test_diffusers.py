"""diffusers: a U-Net and transformers of images, from configurations, fed tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import inlay
from inlay.errors import AttachError
from inlay.testing.snapshots import differences, snapshot
from inlay.testing.tools import shake

pytestmark = [
    pytest.mark.xdist_group("diffusers"),  # imported once
    pytest.mark.filterwarnings("default"),  # theirs are not ours
]
BOTH = "lora(rank=2) + serial_adapter(rank=2, targets=['attention', 'ffn'])"
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4}
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("UNet2DConditionModel", {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": (32, 64), "cross_attention_dim": 32, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8}),
    "dit": ("DiTTransformer2DModel", {
        **SIZES, "out_channels": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10}),
    "sd3": ("SD3Transformer2DModel", {
        **SIZES, "out_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 1,
        "caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 64}),
    "flux": ("FluxTransformer2DModel", {
        **SIZES, "patch_size": 1, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32,
        "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]}),
}  # fmt: skip
SLOW = pytest.mark.slow
EACH = pytest.mark.parametrize(
    "name", ["unet", "dit", *(pytest.param(n, marks=SLOW) for n in ("sd3", "flux"))]
)


@pytest.fixture
def built() -> Callable[[str], Any]:
    """Return a function that builds a model, nothing of it zero: some of these start as the identity."""

    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

    def make(name: str) -> Any:
        kind, settings = BUILT[name]
        torch.manual_seed(0)
        model = getattr(diffusers, kind)(**settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and not parameter.any():
                    parameter.normal_(std=0.1)
        return model.eval()

    return make


def batch(name: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    image, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 32, generator=draw)
    times = torch.tensor([3.0, 7.0])
    if name == "unet":
        return {"sample": image, "timestep": times, "encoder_hidden_states": text}
    if name == "dit":
        return {"hidden_states": image, "timestep": times.long(), "class_labels": torch.tensor([1, 2])}
    if name == "sd3":
        pooled = torch.randn(2, 64, generator=draw)
        return {"hidden_states": image, "timestep": times, "encoder_hidden_states": text,
                "pooled_projections": pooled}  # fmt: skip
    return {
        "hidden_states": torch.randn(2, 6, 4, generator=draw), "encoder_hidden_states": text,
        "pooled_projections": torch.randn(2, 32, generator=draw), "timestep": times / 10,
        "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def image(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return model(**batch(name)).sample


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@EACH
def test_from_attaching_to_detaching(built: Callable[[str], Any], name: str, tmp_path: Path) -> None:
    model, plain = built(name), built(name)
    before, start = snapshot(model), image(model, name)
    inlay.attach(model, BOTH, "style", seed=0)
    with inlay.use(model, "style/lora"):
        assert torch.equal(image(model, name), start)
    assert distance(image(model, name), start) < 2e-3  # a bottleneck starts near nothing
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model, lr=0.01))
    losses = []
    for _ in range(4):
        loss = model(**batch(name)).sample.pow(2).mean()
        loss.backward()
        inlay.check_training(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = image(model, name)
    with inlay.use(model):
        assert torch.equal(image(model, name), start)
    inlay.save(model, tmp_path)
    inlay.load(plain, tmp_path)
    assert torch.equal(image(plain, name), after)
    inlay.detach(model)
    assert differences(before, model) == []


@EACH
def test_merging_gives_the_same_images(built: Callable[[str], Any], name: str) -> None:
    model = built(name)
    start = image(model, name)
    inlay.attach(model, "lora(rank=2, targets=['linear'])")
    shake(model)
    adapted = image(model, name)
    inlay.merge(model)
    assert distance(image(model, name), adapted) < 1e-5 < distance(adapted, start)
    inlay.detach(model)
    assert torch.equal(image(model, name), start)


def test_its_own_folder_holds_the_base_and_the_stack(
    built: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = built("dit")
    inlay.attach(model, BOTH)
    shake(model)
    model.save_pretrained(tmp_path)
    assert "state_dict" not in model.__dict__
    keys = set(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert keys == set(built("dit").state_dict())
    with caplog.at_level(logging.WARNING):
        again = type(built("dit")).from_pretrained(tmp_path).eval()
    assert "not used" not in caplog.text
    inlay.load(again, tmp_path)
    assert torch.equal(image(again, "dit"), image(model, "dit"))


def test_roles_are_found_in_blocks_of_stages_too(built: Callable[[str], Any]) -> None:
    kinds = inlay.plan(built("unet"), "lora(rank=2, targets=['linear'])").parts[0].kinds
    assert kinds == dict.fromkeys(("query", "key", "value", "output"), 12) | {"up": 6, "down": 6}
    found = inlay.plan(
        built("unet"), "serial_adapter(rank=2, targets=['attention', 'cross_attention', 'ffn'])"
    )
    assert found.parts[0].kinds == {"attention": 6, "cross_attention": 6, "ffn": 6}
    tree = str(inlay.anatomy(built("dit")))
    assert "attention: 2 heads of 16" in tree
    assert tree.count("ffn, as a sublayer") == 1
    assert "timestep_embedder  TimestepEmbedding\n" in tree


@pytest.mark.parametrize(
    ("name", "targets", "count"),
    [("unet", ["to_q", "attn2.to_k"], 18), ("unet", ["*.resnets.*.conv1"], 12), ("dit", ["*.ff.net.*"], 4),
     ("sd3", ["add_q_proj", "to_add_out"], 3), ("flux", ["proj_mlp", "x_embedder"], 2)],
)  # fmt: skip
def test_layers_without_a_role_are_reached_by_name(
    built: Callable[[str], Any], name: str, targets: list[str], count: int
) -> None:
    model = built(name)
    start = image(model, name)
    inlay.attach(model, f"lora(rank=2, targets={targets})")
    assert inlay.summary(model).parts[0].sites == count
    shake(model)
    assert distance(image(model, name), start) > 1e-4


def test_attention_that_is_not_transformers_takes_no_prefix(built: Callable[[str], Any]) -> None:
    model = built("dit")
    before = snapshot(model)
    with pytest.raises(
        AttachError, match="does not call attention through transformers' attention interface"
    ):
        inlay.attach(model, "prefix_tuning(length=2)")
    assert differences(before, model) == []
