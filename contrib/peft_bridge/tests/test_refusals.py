"""What has no exact counterpart on the other side is refused, and nothing is changed or half written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from twins import TWINS, logits, saved_by_peft

import inlay
from inlay import InlayError
from inlay.testing.layers import settled
from inlay.testing.tools import shake
from inlay_peft_bridge import from_peft, to_peft

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
Changed = dict[str, Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
]


def changed(
    folder: Path, *, config: Changed | None = None, tensors: Callable[[dict[str, Tensor]], Any] | None = None
) -> None:
    """Change what a checkpoint of peft's says or holds."""
    if config is not None:
        held = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**held, **config}))
    if tensors is not None:
        found = load_file(folder / TENSORS)
        tensors(found)
        save_file(found, folder / TENSORS)


def refused_from(folder: Path, reason: str, saw: str = "", family: str = "bert") -> None:
    """Check that reading is refused for that reason, the model as it was."""
    model = settled(family)
    before = logits(model)
    with pytest.raises(InlayError, match=reason) as error:
        from_peft(folder, model)
    assert saw in error.value.saw
    assert torch.equal(logits(model), before)
    assert not [n for n in model.state_dict() if "inlay" in n]


@pytest.mark.parametrize(
    ("config", "reason", "saw"),
    [
        ({"bias": "all"}, "asks for what has no counterpart", "bias='all'"),
        ({"something_new": 3}, "asks for what has no counterpart", "something_new=3"),
        ({"init_lora_weights": "pissa"}, "weights that its start had changed", "pissa"),
        ({"peft_type": "XLORA"}, "of this kind cannot be converted", "XLORA"),
        ({"peft_type": None}, "does not say what kind of adapter", "peft_type"),
        ({"r": 5}, "does not have the shape that the adapter needs", "needed (5, 32)"),
        ({"use_dora": True}, "layer's tensors are not those of the method", "magnitude"),
    ],
)
def test_configurations(config: Changed, reason: str, saw: str, tmp_path: Path) -> None:
    saved_by_peft("bert", TWINS["lora"], tmp_path)
    changed(tmp_path, config=config)
    refused_from(tmp_path, reason, saw)


@pytest.mark.parametrize(
    ("change", "reason", "saw"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_A.weight"), "layer's tensors are not those of the method", "query"),
        (lambda t: t.update({f"{QUERY}.other": torch.ones(2)}), "tensors of another kind", "query.other"),
        (lambda t: t.update({f"{QUERY}.bias": torch.ones(32)}), "tensors of another kind", "query.bias"),
        (lambda t: t.clear(), "tensors of another kind", "none of"),
        (lambda t: t[f"{QUERY}.lora_A.weight"].fill_(float("nan")), "are not finite numbers", "query"),
    ],
)
def test_tensors(change: Any, reason: str, saw: str, tmp_path: Path) -> None:
    saved_by_peft("bert", TWINS["lora"], tmp_path)
    changed(tmp_path, tensors=change)
    refused_from(tmp_path, reason, saw)


def test_files(tmp_path: Path) -> None:
    refused_from(tmp_path, "a file of the adapter is missing", "adapter_config.json")
    saved_by_peft("bert", TWINS["lora"], tmp_path)
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    refused_from(tmp_path, "a pickle, which could run code", "adapter_model.bin")
    (tmp_path / TENSORS).write_bytes(b"no such thing")
    refused_from(tmp_path, "safetensors cannot be read")
    (tmp_path / CONFIG).write_text('{"peft_type": NaN}')
    refused_from(tmp_path, "config.json cannot be read", "not a finite number")
    (tmp_path / CONFIG).write_bytes(b" " * (17 << 20))
    refused_from(tmp_path, "config.json is too large")


def test_another_base(tmp_path: Path) -> None:
    saved_by_peft("bert", TWINS["lora"], tmp_path)
    with pytest.raises(InlayError):
        from_peft(tmp_path, settled("llama"))


def test_an_embedding_of_its_own(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens"])
    model = peft.get_peft_model(settled("llama"), config)
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    from_peft(tmp_path, settled("llama"))
    changed(tmp_path, tensors=lambda t: next(v for k, v in t.items() if "base_layer" in k).add_(1))
    with pytest.raises(InlayError, match="holds an embedding that is not the base's"):
        from_peft(tmp_path, settled("llama"))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"num_cayley_neumann_terms": 3}, "series of so few terms is not Cayley's"),
        ({"peft_version": "0.17.1"}, "before its version 0.18 peft computed this series"),
    ],
)
def test_series_of_oft(config: Changed, reason: str, tmp_path: Path) -> None:
    saved_by_peft("bert", TWINS["oft"], tmp_path)
    changed(tmp_path, config=config)
    refused_from(tmp_path, reason)


def refused_to(model: nn.Module, folder: Path, reason: str) -> None:
    """Check that writing is refused for that reason and leaves nothing."""
    with pytest.raises(InlayError, match=reason):
        to_peft(model, folder / "out")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("family", "stack", "reason"),
    [
        ("llama", "ssf()", "peft has no counterpart of this method"),
        ("llama", "lora() + ia3()", "holds one method beside modules trained whole"),
        ("llama", "lora() + lora(rank=2).named('two')", "two parts act on one layer"),
        (
            "llama",
            "lora(targets=['query']) + lora(dropout=0.1, targets=['value']).named('two')",
            "layers differ in a setting that peft has once for all",
        ),
        ("gpt2", "hra(rank=2)", "cannot adapt a slice of a fused layer by hra"),
        ("vit", "oft(block_size=8, targets=['patch_embeddings.projection'])", "sums overlapping patches"),
        ("llama", "oft(block_size=8, terms=2)", "series of so few terms is not Cayley's"),
        (
            "gpt2",
            "lora(targets=['query']) + lora(alpha=2, targets=['value']).named('two')",
            "two parts act on one layer",
        ),
    ],
)
def test_adapters(family: str, stack: str, reason: str, tmp_path: Path) -> None:
    model = settled(family)
    inlay.attach(model, stack)
    refused_to(model, tmp_path, reason)


def test_a_convolution_that_peft_runs_in_another_way(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2))
    inlay.attach(model, "lora(rank=2, targets=['0'])")
    refused_to(model, tmp_path, "runs the factors of this convolution in another way")


def test_only_a_head(tmp_path: Path) -> None:
    model = settled("bert")
    inlay.attach(model, "trained()")
    refused_to(model, tmp_path, "holds one method beside modules trained whole")


def test_experts(tmp_path: Path) -> None:
    from inlay.testing.models import build

    model = build("mixtral")
    inlay.attach(model, "lora(targets=['up'])")
    refused_to(model, tmp_path, "an expert's matrix is no module")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = settled("llama")
    inlay.attach(model, "lora()")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "here").touch()
    with pytest.raises(InlayError, match="the output is not a new or empty folder"):
        to_peft(model, tmp_path / "out")


def test_dora_needs_the_bases_weights(tmp_path: Path) -> None:
    saved_by_peft("bert", TWINS["dora"], tmp_path)
    with pytest.raises(InlayError, match="needs the values of the base's weights"):
        from_peft(tmp_path, settled("bert").to("meta"))


def test_the_other_side_of_a_layer(tmp_path: Path) -> None:
    config = peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["attention.output.dense"],
        feedforward_modules=["attention.output.dense"],
    )  # fmt: skip
    peft.get_peft_model(settled("bert"), config).save_pretrained(str(tmp_path))
    refused_from(tmp_path, "peft scales the other side of this layer")


def test_slices_with_scales_of_their_own(tmp_path: Path) -> None:
    from inlay_peft_bridge.lora import join

    one = {"down": torch.ones(2, 4), "up": torch.ones(4, 2)}
    configs = [{"r": 2, "lora_alpha": alpha, "use_rslora": False} for alpha in (2, 3)]
    part = inlay.sites.Slice(0, 4)
    with pytest.raises(InlayError, match="slices of one fused layer have scales of their own"):
        join([(part, one, config) for config in configs], 12)


def test_values_are_rounded_to_the_bases_dtype_and_that_is_said(tmp_path: Path) -> None:
    saved_by_peft("llama", TWINS["lora"], tmp_path)
    model = settled("llama").bfloat16()
    report = from_peft(tmp_path, model)
    assert "values were rounded from float32 to bfloat16" in str(report)
    shake(model)


@pytest.mark.parametrize("method", ["vera", "randlora"])
def test_matrices_that_are_not_in_the_file(method: str, tmp_path: Path) -> None:
    saved_by_peft("bert", TWINS[method], tmp_path)

    def without(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if k.endswith(("_A", "_B"))]:
            del tensors[key]

    changed(tmp_path, tensors=without)
    refused_from(tmp_path, "the tensors that all layers share are not in the checkpoint", "common.A")


@pytest.mark.parametrize(
    ("stack", "reason"),
    [
        ("lora(bias='layer')", "peft keeps trained biases of layers as values of the base's"),
        ("delora()", "peft's DeLoRA has no start to subtract"),
        ("miss(rank=8, mode='bat', dropout=0.1)", "peft's MiSS of this mode has no dropout"),
        (
            "vera(rank=4, targets=['query']) + vera(rank=4, targets=['value']).named('two')",
            "in peft all layers share the same matrices, and here each part has its own",
        ),
    ],
)
def test_settings_and_parts_that_peft_has_no_place_for(stack: str, reason: str, tmp_path: Path) -> None:
    model = settled("bert")
    inlay.attach(model, stack, seed=0)
    refused_to(model, tmp_path, reason)
