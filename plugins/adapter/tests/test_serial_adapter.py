"""Serial adapters against the papers: counts, equations in plain torch, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel

import inlay
from inlay.authoring import ConfigError, Delta, TargetError
from inlay.errors import AttachError
from inlay.stack import need_state
from inlay.testing.effects import output
from inlay.testing.models import batch_for, build
from inlay.testing.tools import shake
from inlay_adapter import SerialAdapter

PLACEMENTS = ("houlsby", "pfeiffer")
DOUBLE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def bottlenecks(model: nn.Module, name: str = "default") -> list[Any]:
    """Return the sublayer deltas of an adapter in model order."""
    return [d for s, d in need_state(model).adapter_of(name).placed if s.kind == "sublayer"]


def z(delta: Any, h: Tensor, act: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    """The papers' formula, without a skip."""
    return act(h @ delta.down.T + delta.down_bias) @ delta.up.T + delta.up_bias


def pair(family: str, method: SerialAdapter) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Return (adapted and scrambled, an untouched copy of its base, a batch), in float64."""
    model = build(family, dtype=torch.float64)
    base = copy.deepcopy(model)
    inlay.attach(model, method)
    shake(model, size=1.0)
    return model, base, batch_for(model)


def bert_base() -> nn.Module:
    with torch.device("meta"):
        return BertModel(BertConfig())


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (SerialAdapter(), 2_417_664),
        (SerialAdapter(train_layernorms=False), 2_379_264),
        (SerialAdapter("pfeiffer"), 894_528),
        (SerialAdapter("pfeiffer", scale="learned"), 894_528 + 12),
        (SerialAdapter("pfeiffer", scale="channel"), 894_528 + 12 * 768),
    ],
)
def test_counts_of_the_papers_on_bert_base(method: SerialAdapter, count: int) -> None:
    assert inlay.plan(bert_base(), method).parameters == count


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "vit"])
def test_zero_up_is_the_base_bit_for_bit(family: str, placement: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build(family, dtype=dtype)
        batch = batch_for(model)
        before = output(model, batch)
        method = SerialAdapter(placement, init="lora")  # type: ignore[arg-type]
        assert method.starts_as_identity
        inlay.attach(model, method)
        assert torch.equal(output(model, batch), before)
        shake(model, size=1.0)
        assert not torch.equal(output(model, batch), before)


def test_small_random_start_is_near_the_base_but_not_at_it() -> None:
    model = build("bert")
    batch = batch_for(model)
    before = output(model, batch)
    method = SerialAdapter(init_std=1e-3)
    assert not method.starts_as_identity
    inlay.attach(model, method)
    change = (output(model, batch) - before).abs().max()
    assert 0 < change < 1e-3


def test_starting_values() -> None:
    model = build("bert", hidden_size=256, intermediate_size=64)
    inlay.attach(model, SerialAdapter(), name="h")
    inlay.attach(model, SerialAdapter("pfeiffer"), name="p")
    inlay.attach(model, SerialAdapter("pfeiffer", rank=64, init="lora"), name="l")
    houlsby, pfeiffer, lora = (bottlenecks(model, n)[0].requires_grad_(False) for n in "hpl")
    assert houlsby.down.shape == (64, 256)
    assert pfeiffer.down.shape == (16, 256)
    assert houlsby.down.abs().max() <= 2e-2
    assert houlsby.up.std() == pytest.approx(0.88e-2, rel=0.05)
    assert pfeiffer.down.std() == pytest.approx(0.02, rel=0.05)
    assert pfeiffer.up.abs().max() > 4e-2
    assert lora.down.abs().max() <= 256**-0.5
    assert lora.down.std() == pytest.approx((3 * 256) ** -0.5, rel=0.05)
    assert not lora.up.any()
    assert not any(d.down_bias.any() or d.up_bias.any() for d in (houlsby, pfeiffer, lora))


def test_pfeiffer_has_at_least_one_unit() -> None:
    model = build("bert", hidden_size=8, intermediate_size=8)
    inlay.attach(model, SerialAdapter("pfeiffer"))
    assert bottlenecks(model)[0].down.shape == (1, 8)


def test_houlsby_on_a_post_norm_model() -> None:
    """LN(x + A(drop(W_o attn))) and LN(a + A(drop(FFN))), with learned differences on every norm."""
    model, base, batch = pair("bert", SerialAdapter(rank=4))
    before = output(base, batch)
    gelu = lambda h: F.gelu(h, approximate="tanh")  # noqa: E731
    sublayers = [m for layer in base.bert.encoder.layer for m in (layer.attention.output, layer.output)]
    for delta, module in zip(bottlenecks(model), sublayers_in_order(model, sublayers), strict=True):
        module.dropout.register_forward_hook(lambda m, a, y, d=delta: y + z(d, y, gelu))
    for site, delta in need_state(model).adapter_of("default").placed:
        if site.kind == "norm":
            norm = base.get_submodule(site.name)
            norm.weight.data += delta.weight.data
            norm.bias.data += delta.bias.data
    torch.testing.assert_close(output(model, batch), output(base, batch), **DOUBLE)
    assert not torch.allclose(output(model, batch), before)


def sublayers_in_order(model: nn.Module, modules: list[Any]) -> list[Any]:
    """Return BERT's (attention.output, output) of each layer in the order the adapter placed its deltas."""
    sites = [s for s, _ in need_state(model).adapter_of("default").placed if s.kind == "sublayer"]
    return [modules[2 * s.layer + (s.role == "ffn")] for s in sites]


def test_houlsby_on_a_pre_norm_model() -> None:
    """x + A(attn(LN(x))) and a + A(FFN(LN(a)))."""
    model, base, batch = pair("llama", SerialAdapter(rank=4, act="silu", train_layernorms=False))
    for site, delta in need_state(model).adapter_of("default").placed:
        layer = base.model.layers[site.layer]
        if site.role == "ffn":
            layer.mlp.register_forward_hook(lambda m, a, y, d=delta: y + z(d, y, F.silu))
        else:
            layer.self_attn.register_forward_hook(lambda m, a, y, d=delta: (y[0] + z(d, y[0], F.silu), y[1]))
    torch.testing.assert_close(output(model, batch), output(base, batch), **DOUBLE)


def test_houlsby_on_an_encoder_decoder_leaves_cross_attention_alone() -> None:
    model, base, batch = pair("t5", SerialAdapter(rank=4, act="relu", train_layernorms=False))
    placed = need_state(model).adapter_of("default").placed
    assert len(placed) == 2 * 2 + 2 * 2
    assert not any(site.cross for site, _ in placed)
    for site, delta in placed:
        block = getattr(base, site.side).block[site.layer]
        layer = block.layer[0 if site.role == "attention" else -1]
        layer.dropout.register_forward_hook(lambda m, a, y, d=delta: y + z(d, y))
    torch.testing.assert_close(output(model, batch), output(base, batch), **DOUBLE)


def test_houlsby_reads_the_output_before_the_residual() -> None:
    """With the sublayer's last projection zeroed, the bottleneck sees exactly that projection's bias."""
    model = build("bert")
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight.data.zero_()
    dense.bias.data.normal_()
    inlay.attach(model, SerialAdapter(targets=["ffn"], layers=[0]))
    seen: list[Tensor] = []
    bottlenecks(model)[0].register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    output(model, batch_for(model))
    assert torch.equal(seen[0], dense.bias.expand_as(seen[0]))


def hook_pfeiffer(base: nn.Module, deltas: list[Any], *, naive: bool = False) -> None:
    """Recompute BERT's output modules as LN(z(LN(f + a)) + f + a), or, naively, LN(f + a) + z."""
    for layer, delta in zip(base.bert.encoder.layer, deltas, strict=True):

        def again(module: Any, args: Any, out: Tensor, delta: Any = delta) -> Tensor:
            f, a = module.dense(args[0]), args[1]
            h = module.LayerNorm(f + a)
            return h + z(delta, h) if naive else module.LayerNorm(z(delta, h) + f + a)

        layer.output.register_forward_hook(again)


def test_pfeiffer_on_a_post_norm_model_applies_the_norm_twice() -> None:
    model, base, batch = pair("bert", SerialAdapter("pfeiffer", rank=4))
    naive = copy.deepcopy(base)
    hook_pfeiffer(base, bottlenecks(model))
    hook_pfeiffer(naive, bottlenecks(model), naive=True)
    torch.testing.assert_close(output(model, batch), output(base, batch), **DOUBLE)
    assert (output(model, batch) - output(naive, batch)).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pfeiffer_on_a_pre_norm_model_reads_the_residual_stream(family: str) -> None:
    """Each block gives out + z(out), out being what it gives without the adapter."""
    model, base, batch = pair(family, SerialAdapter("pfeiffer", rank=4))
    layers = base.model.layers if family == "llama" else base.transformer.h
    for layer, delta in zip(layers, bottlenecks(model), strict=True):
        layer.register_forward_hook(lambda m, a, out, d=delta: _first(out, lambda o: o + z(d, o)))
    torch.testing.assert_close(output(model, batch), output(base, batch), **DOUBLE)


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def test_pfeiffer_behind_attention() -> None:
    """rabeehk/compacter keeps the adapter behind self-attention; so can targets."""
    model, base, batch = pair("bert", SerialAdapter("pfeiffer", rank=4, targets=["attention"]))
    for layer, delta in zip(base.bert.encoder.layer, bottlenecks(model), strict=True):

        def again(module: Any, args: Any, out: Tensor, delta: Any = delta) -> Tensor:
            total = module.dense(args[0]) + args[1]
            return module.LayerNorm(total + z(delta, module.LayerNorm(total)))

        layer.attention.output.register_forward_hook(again)
    torch.testing.assert_close(output(model, batch), output(base, batch), **DOUBLE)


def test_two_pfeiffer_adapters_form_an_onion() -> None:
    """The second reads LN(f + z₁ + a): what the block gives with the first."""
    model = build("bert", dtype=torch.float64)
    base, batch = copy.deepcopy(model), batch_for(model)
    for name in ("one", "two"):
        inlay.attach(model, SerialAdapter("pfeiffer", rank=4), name=name)
    shake(model, size=1.0)
    both = zip(base.bert.encoder.layer, bottlenecks(model, "one"), bottlenecks(model, "two"), strict=True)
    for layer, one, two in both:

        def again(module: Any, args: Any, out: Tensor, one: Any = one, two: Any = two) -> Tensor:
            total = module.dense(args[0]) + args[1]
            total = total + z(one, module.LayerNorm(total))
            return module.LayerNorm(total + z(two, module.LayerNorm(total)))

        layer.output.register_forward_hook(again)
    torch.testing.assert_close(output(model, batch), output(base, batch), **DOUBLE)


@pytest.mark.parametrize("scale", [2.5, "learned", "channel"])
def test_scale_multiplies_the_branch(scale: Any) -> None:
    model = build("bert", dtype=torch.float64)
    inlay.attach(model, SerialAdapter("pfeiffer", rank=4, scale=scale))
    shake(model, size=1.0)
    delta = bottlenecks(model)[0]
    h = torch.randn(2, 3, 32, dtype=torch.float64)
    factor = torch.as_tensor(delta.scale)
    assert factor.numel() == {"learned": 1, "channel": 32}.get(scale, 1)
    torch.testing.assert_close(delta.branch(h), z(delta, h) * factor, **DOUBLE)


def test_dropout_acts_on_the_branch_in_training_only() -> None:
    model = build("bert")
    inlay.attach(model, SerialAdapter("pfeiffer", rank=4, dropout=0.5))
    shake(model, size=1.0)
    seen: list[Tensor] = []
    delta = bottlenecks(model)[0]
    delta.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    batch = batch_for(model)
    output(model, batch)
    assert not (seen[-1] == 0).any()
    delta.train()
    output(model, batch)
    dropped = seen[-1] == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(seen[-1][~dropped], 2 * seen[0][~dropped])


def test_norms_train_where_targets_of_your_own_name_them() -> None:
    model = bert_base()
    kinds = lambda **s: set(inlay.plan(model, SerialAdapter(**s)).parts[0].kinds)  # noqa: E731
    assert kinds(targets=["ffn"]) == {"ffn"}
    assert kinds(targets=["ffn", "norm"]) == {"ffn", "norm"}
    assert kinds(layers="0-2") == {"attention", "ffn", "norm"}
    with pytest.raises(TargetError, match="this BertModel has no 'norm'"):
        kinds(placement="pfeiffer", targets=["ffn", "norm"])


def test_settings_survive_being_written_down() -> None:
    for method in (
        SerialAdapter(),
        SerialAdapter("pfeiffer", rank=8),
        SerialAdapter(targets=["ffn", "norm"]),
    ):
        assert SerialAdapter(**method.to_dict()) == method


@pytest.mark.parametrize(
    ("targets", "saw"),
    [
        (["ffn"], r"train_layernorms=True; found \['sublayer'\]"),
        (["norm"], r"targets=\('norm',\).*\['norm'\]"),
    ],
)
def test_refuses_targets_that_contradict_the_settings(targets: list[str], saw: str) -> None:
    with pytest.raises(TargetError, match=saw):
        inlay.attach(build("bert"), SerialAdapter(targets=targets, train_layernorms=True))


def bart() -> nn.Module:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64, "encoder_ffn_dim": 16,
             "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    return BartForConditionalGeneration(BartConfig(**sizes, max_position_embeddings=16)).eval()


def test_refuses_a_residual_that_is_not_found() -> None:
    with pytest.raises(TargetError, match='use placement="houlsby"'):
        inlay.attach(bart(), SerialAdapter("pfeiffer", targets=["cross_attention"]))


def test_says_where_a_residual_is_not_known_in_time() -> None:
    """BART adds the residual before a norm that looks, in the module tree, like a pre-norm model's."""
    model = bart()
    inlay.attach(model, SerialAdapter("pfeiffer", targets=["both.attention"]))
    with pytest.raises(AttachError, match=r"layers\.0\.attention: its norm runs after the residual"):
        output(model, {"input_ids": torch.tensor([[5, 6, 7]])})


def test_says_why_it_cannot_be_merged() -> None:
    model = build("bert")
    inlay.attach(model, SerialAdapter())
    with pytest.raises(inlay.CannotMerge, match=r"layer\.0\.\w+: a bottleneck with a nonlinearity"):
        inlay.merge(model)


def test_refuses_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match="rank=0"):
        SerialAdapter(rank=0)
    with pytest.raises(ConfigError, match="'houlsby', 'pfeiffer'"):
        SerialAdapter("serial")  # type: ignore[arg-type]
    assert not Delta.why_not(bottleneck()).startswith("a bottleneck")


def bottleneck() -> Any:
    model = build("bert")
    inlay.attach(model, SerialAdapter())
    return bottlenecks(model)[0]
