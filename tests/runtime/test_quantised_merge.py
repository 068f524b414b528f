"""Merging into quantised layers: as plain ones, or back into their few bits; and unmerging, bit for bit."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.anatomy import Anatomy
from inlay.backends import backend_of
from inlay.errors import CannotMerge, ConfigError
from inlay.stack import need_state
from inlay.testing.layers import deltas_of
from inlay.testing.models import batch_for
from inlay.testing.quantised import KINDS, PACKED_SIZES, few_bits, packed, packed_tensors
from inlay.testing.refusal import refused
from inlay.testing.snapshots import differences, digest, snapshot
from inlay.testing.tools import distance, lively, shake
from inlay.weights import read

pytest.importorskip("bitsandbytes")
ao = pytest.importorskip("torchao.quantization")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt.*:UserWarning",
    "ignore:.*bitsandbytes..gemv_4bit. an autograd kernel was not registered.*:UserWarning",
)
SIZES = {**PACKED_SIZES, "attention_bias": True}
STACK = "lora(rank=4) + ia3() + dora(rank=2, targets=['output'])"
QUERY = "model.layers.0.self_attn.q_proj"
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
BOTH_WAYS = pytest.mark.parametrize("how", ["dequantise", "requantise"])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch_for(model)).logits


def adapted(kind: str, stack: str = STACK, family: str = "llama") -> nn.Module:
    model = packed(family, kind, **(SIZES if family == "llama" else {}))
    logits(model)  # the first forward rearranges some weights
    inlay.attach(model, stack, seed=1)
    shake(model)
    return model


def site_of(model: nn.Module, name: str) -> Any:
    return next(s for s in Anatomy(model).leaves if s.name == name)


def folded(model: nn.Module, name: str = QUERY) -> Tensor:
    """Return W + s·B A of a LoRA at one layer, in float32, W being what the layer's bits stand for."""
    delta: Any = deltas_of(model)[name]
    return (read(site_of(model, name))[0] + delta.scale * delta.up @ delta.down).detach()


@EVERY_KIND
def test_merged_as_plain_layers_it_does_what_it_did(kind: str) -> None:
    model = adapted(kind)
    expected, base = logits(model), logits(packed("llama", kind, **SIZES))
    report = inlay.merge(model, quantised="dequantise")
    assert [s.quantised for s in report.sites] == ["dequantise"] * 10
    assert max(s.noise for s in report.sites) < 1e-7
    assert report.worst < 1e-5
    layer = model.get_submodule(QUERY)
    assert isinstance(layer, nn.Linear)
    assert type(layer.weight) is nn.Parameter
    assert layer.weight.dtype == torch.float32
    assert not any(word in str(layer) for word in ("4bit", "8bit", "Int8", "Intx"))
    # The quantised layers of 8 bits round their input too, which plain ones do not.
    assert distance(logits(model), expected) < max(1e-5, 5 * KINDS[kind].rounding)
    assert distance(expected, base) > 0.2


@EVERY_KIND
def test_merged_into_few_bits_it_holds_what_the_library_makes_of_the_merged_weight(kind: str) -> None:
    """The same scheme: bit for bit what quantising the merged weight anew gives; and its cost is reported."""
    model = adapted(kind, "lora(rank=4)")
    merged, change = folded(model), folded(model) - read(site_of(model, QUERY))[0]
    before = type(model.get_submodule(QUERY).weight)
    report = inlay.merge(model, quantised="requantise")
    assert type(model.get_submodule(QUERY).weight) is before
    held = read(site_of(model, QUERY))[0]
    anew = nn.Linear(64, 64, bias=False)
    anew.weight = nn.Parameter(merged.clone())
    expected = backend_of(made := few_bits(anew, kind)).dequantize(made)  # type: ignore[union-attr]
    assert torch.equal(held, expected.float())
    site = next(s for s in report.sites if s.site == QUERY)
    lost = float((held - merged).norm())
    assert site.change == pytest.approx(float(change.norm()), rel=1e-5)
    assert site.rounding == pytest.approx(lost / float(change.norm()), rel=1e-4)
    assert site.noise == pytest.approx(lost / float(merged.norm()), rel=1e-4)
    assert 1e-3 < site.noise < KINDS[kind].noise
    assert "; 4 sites in quantised layers, requantised, at a cost of up to " in str(report)


@EVERY_KIND
@BOTH_WAYS
def test_unmerging_gives_the_very_same_layers_back(how: str, kind: str) -> None:
    model = adapted(kind, f"{STACK} + serial_adapter()")
    parts = ["default/lora", "default/ia3", "default/dora"]
    expected, shot = logits(model), snapshot(model)
    inlay.merge(model, parts, quantised=how)
    logits(model)
    inlay.unmerge(model)
    assert differences(shot, model) == []
    assert torch.equal(logits(model), expected)


@EVERY_KIND
@BOTH_WAYS
def test_detaching_unmerges(how: str, kind: str) -> None:
    model = adapted(kind)
    inlay.merge(model, quantised=how)
    inlay.detach(model)
    plain = packed("llama", kind, **SIZES)
    assert torch.equal(logits(model), logits(plain))
    assert digest(packed_tensors(model)) == digest(packed_tensors(plain))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@EVERY_KIND
@BOTH_WAYS
def test_a_copy_of_a_merged_model_unmerges_by_itself(how: str, kind: str) -> None:
    model = adapted(kind)
    expected = logits(model)
    inlay.merge(model, quantised=how)
    twin = copy.deepcopy(model)
    merged = logits(model)
    inlay.unmerge(twin)
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), merged)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int4"])
@BOTH_WAYS
def test_merged_for_good_nothing_of_inlay_is_left(how: str, kind: str) -> None:
    model = adapted(kind)
    inlay.merge(model, undo=False, quantised=how)
    plain = packed("llama", kind, **SIZES)
    assert not any("inlay" in name for name, _ in model.named_modules())
    touched = {m for m in model.modules() if type(m) is nn.Linear} if how == "dequantise" else set()
    same = [(m, p) for m, p in zip(model.modules(), plain.modules(), strict=True) if m not in touched]
    assert all(type(m) is type(p) for m, p in same)
    assert [k for k in vars(model.get_submodule(QUERY)) if k.startswith("_inlay")] == []


CONFIGS = {
    "nf4": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 in bfloat16": lambda: transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
    ),
    "int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: transformers.TorchAoConfig(ao.Int8WeightOnlyConfig(set_inductor_config=False)),
    "torchao int4": lambda: transformers.TorchAoConfig(
        ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@BOTH_WAYS
def test_a_model_loaded_by_transformers_in_bfloat16(how: str, name: str, tmp_path: Path) -> None:
    """Adapters take the dtype of the model around the layers; merged for good, it loads as it was saved."""
    lively("llama", **SIZES).to(torch.bfloat16).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "base", quantization_config=CONFIGS[name](), dtype=torch.bfloat16)
    inlay.attach(model.train(), "lora(rank=4) + serial_adapter()", seed=1)
    shake(model)
    assert {p.dtype for _, _, p in need_state(model).own_parameters()} == {torch.bfloat16}
    loss = model(**batch_for(model, labels=True)).loss
    loss.backward()
    inlay.check_training(model)
    inlay.detach(model.eval())
    inlay.attach(model, "lora(rank=4)", seed=1)
    shake(model)
    expected = logits(model)
    inlay.merge(model, undo=False, quantised=how)
    merged = logits(model)
    assert distance(merged, expected) < (0.5 if how == "requantise" else 0.06)
    model.save_pretrained(tmp_path / "merged")
    again = kind.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert torch.equal(logits(again), merged)
    kinds = {type(again.get_submodule(n)) for n in (QUERY, QUERY.replace("q_proj", "k_proj"))}
    assert type(again.get_submodule(QUERY).weight) is type(model.get_submodule(QUERY).weight)
    assert len(kinds) == (2 if how == "dequantise" and "torchao" not in name else 1)


@EVERY_KIND
@BOTH_WAYS
def test_what_is_saved_while_merged_is_unmerged(how: str, kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    expected = logits(model)
    inlay.save(model, tmp_path / "before")
    inlay.merge(model, quantised=how)
    inlay.save(model, tmp_path / "while")
    base = [json.loads((tmp_path / f / "inlay.json").read_text())["base"] for f in ("before", "while")]
    assert base[0] == base[1]
    fresh = packed("llama", kind, **SIZES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "MatMul8bitLt")
        inlay.load(fresh, tmp_path / "while")
    logits(fresh)
    assert torch.equal(logits(fresh), expected)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8 in groups"])
@BOTH_WAYS
def test_slices_of_a_fused_projection(how: str, kind: str) -> None:
    """transformers quantises GPT-2's Conv1D as linear layers: queries and values change, keys do not."""
    sizes = {"n_embd": 64, "n_head": 4}
    model = packed("gpt2", kind, **sizes)
    inlay.attach(model, "lora(rank=4, targets=['query', 'value'])", seed=1)
    shake(model)
    name = "transformer.h.0.attn.c_attn"
    expected, shot = logits(model), snapshot(model)
    before = backend_of(model.get_submodule(name)).dequantize(model.get_submodule(name))  # type: ignore[union-attr]
    deltas: Any = deltas_of(model)
    wanted = before.clone()
    for role, rows in {"query": slice(0, 64), "value": slice(128, 192)}.items():
        delta = deltas[f"{name}[{role}]"]
        wanted[rows] += delta.scale * delta.up @ delta.down
    report = inlay.merge(model, quantised=how)
    assert sorted(s.site for s in report.sites)[:2] == [f"{name}[query]", f"{name}[value]"]
    layer = model.get_submodule(name)
    backend = backend_of(layer)
    held = layer.weight if backend is None else backend.dequantize(layer)
    if how == "dequantise":
        assert torch.equal(held[64:128], before[64:128])
        assert distance(held, wanted) < 1e-6
        assert distance(logits(model), expected) < 1e-5
    else:
        anew = nn.Linear(64, 192, bias=False)
        anew.weight = nn.Parameter(wanted.detach().clone())
        made = few_bits(anew, kind)
        assert distance(held, backend_of(made).dequantize(made)) < 1e-3  # type: ignore[union-attr]
    inlay.unmerge(model)
    assert differences(shot, model) == []
    assert torch.equal(logits(model), expected)


@EVERY_KIND
def test_a_member_that_stays_above_reads_the_merged_weight(kind: str) -> None:
    model = adapted(kind, "lora(rank=4, targets=['query']) + dora(rank=2, targets=['query'])")
    expected = logits(model)
    inlay.merge(model, ["default/lora"], quantised="dequantise")
    assert distance(logits(model), expected) < max(1e-5, 5 * KINDS[kind].rounding)
    inlay.unmerge(model)
    assert torch.equal(logits(model), expected)


@EVERY_KIND
def test_a_weight_that_a_merge_leaves_alone_keeps_its_bits(kind: str) -> None:
    model = adapted(kind, "bitfit()")
    before, bias = digest(packed_tensors(model)), model.get_submodule(QUERY).bias.clone()
    report = inlay.merge(model, quantised="requantise")
    assert digest(packed_tensors(model)) == before
    assert max(s.noise for s in report.sites) == 0
    assert not torch.equal(model.get_submodule(QUERY).bias, bias)


# -- refusals ------------------------------------------------------------------------------------


@EVERY_KIND
def test_without_a_word_it_is_refused_and_the_ways_out_are_named(kind: str) -> None:
    model = adapted(kind)
    match = rf"the weight cannot be written[\s\S]*{QUERY}: it is quantised"
    with refused(CannotMerge, match, model=model) as caught:
        inlay.merge(model)
    assert 'quantised="dequantise"' in caught.error.do
    assert '"requantise"' in caught.error.do


@pytest.mark.parametrize("value", ["requantize", True, 4, ""])
def test_another_way_to_merge_is_refused(value: Any) -> None:
    model = adapted("nf4")
    with refused(ConfigError, "quantised layers cannot be merged into that way", model=model):
        inlay.merge(model, quantised=value)


def test_a_scheme_that_cannot_be_written_is_refused_and_the_layers_before_it_are_put_back() -> None:
    """float8 can be read, but core has no writer for it."""
    model = packed("llama", "torchao int8", **SIZES)
    last = model.get_submodule("model.layers.1.self_attn")
    layer = lively("llama", **SIZES).get_submodule("model.layers.1.self_attn.v_proj").requires_grad_(False)
    last.v_proj = nn.Sequential(layer)
    ao.quantize_(last.v_proj, ao.Float8WeightOnlyConfig(set_inductor_config=False))
    last.v_proj = last.v_proj[0]
    inlay.attach(model, "lora(rank=4)", seed=1)
    shake(model)
    match = r"can be read but not written in its own scheme[\s\S]*a Float8Tensor of torchao"
    with refused(CannotMerge, match, model=model):
        inlay.merge(model, quantised="requantise")
    expected = logits(model)
    inlay.merge(model, quantised="dequantise")
    assert distance(logits(model), expected) < 1e-2  # float8 layers compute in bfloat16


@BOTH_WAYS
def test_values_beyond_the_layers_own_range_are_refused(how: str) -> None:
    """bitsandbytes quantises to 8 bits from float16; a plain layer would hold such values."""
    model = adapted("int8", "lora(rank=4)")
    with torch.no_grad():
        for _, name, parameter in need_state(model).own_parameters():
            if name.endswith("up") and "layers.1" in name:
                parameter.mul_(1e6)
    if how == "dequantise":
        inlay.merge(model, quantised=how)
        return
    with refused(CannotMerge, r"does not fit into the layer's own bits[\s\S]*layers\.1", model=model):
        inlay.merge(model, quantised=how)


@BOTH_WAYS
def test_a_merge_that_fails_late_leaves_the_bits_alone(how: str) -> None:
    model = adapted("nested nf4")
    placed = need_state(model).placed[0].adapter.placed[-1]
    with torch.no_grad():
        placed[1].up[0, 0] = torch.inf  # type: ignore[union-attr, index, operator]
    expected = digest(packed_tensors(model))
    with refused(CannotMerge, rf"not finite[\s\S]*{placed[0].name}", model=model):
        inlay.merge(model, quantised=how)
    assert digest(packed_tensors(model)) == expected


def test_quantised_layers_that_share_their_weight_are_refused() -> None:
    model = packed("llama", "torchao int8", **SIZES)
    first, second = (model.get_submodule(f"model.layers.{i}.self_attn") for i in (0, 1))
    second.q_proj.weight = first.q_proj.weight
    inlay.attach(model, "lora(rank=4)", seed=1)
    shake(model)
    with refused(CannotMerge, r"q_proj: its storage is tied to model\.layers\.1", model=model):
        inlay.merge(model, quantised="requantise")


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize("kind", ["nf4", "torchao int4"])
def test_other_families_merge_and_unmerge(kind: str, family: str) -> None:
    sizes = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    model = packed(family, kind, **sizes)
    logits(model)
    inlay.attach(model, "lora(rank=4, targets=['linear']) + ia3() + dora(rank=2, targets=['up'])", seed=1)
    shake(model)
    expected, shot = logits(model), snapshot(model)
    inlay.merge(model, quantised="dequantise")
    assert distance(logits(model), expected) < max(1e-5, 5 * KINDS[kind].rounding)
    inlay.unmerge(model)
    report = inlay.merge(model, quantised="requantise")
    assert max(s.noise for s in report.sites) < KINDS[kind].noise
    inlay.unmerge(model)
    assert differences(shot, model) == []
    assert torch.equal(logits(model), expected)
