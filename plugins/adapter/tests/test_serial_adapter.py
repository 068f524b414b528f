"""Serial adapters against the papers: counts, equations in plain torch, what learns, what is refused."""

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
from inlay.stack import need_state
from inlay.testing.models import batch_for, build
from inlay_adapter import SerialAdapter

PLACEMENTS = ("houlsby", "pfeiffer")
DOUBLE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def bottlenecks(model: nn.Module, name: str = "default") -> list[Any]:
    """Return the sublayer deltas of an adapter in model order."""
    return [d for s, d in need_state(model).adapter_of(name).placed if s.kind == "sublayer"]


def scramble(model: nn.Module, std: float = 0.3) -> None:
    """Give every adapter tensor values far from its start."""
    generator = torch.Generator().manual_seed(1)
    for _, _, p in need_state(model).own_parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * std)


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch).logits
    return result


def z(delta: Any, h: Tensor, act: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    """The papers' formula, without a skip."""
    return act(h @ delta.down.T + delta.down_bias) @ delta.up.T + delta.up_bias


def pair(family: str, method: SerialAdapter) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Return (adapted and scrambled, an untouched copy of its base, a batch), in float64."""
    model = build(family, dtype=torch.float64)
    base = copy.deepcopy(model)
    inlay.attach(model, method)
    scramble(model)
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
        before = logits(model, batch)
        method = SerialAdapter(placement, init="lora")  # type: ignore[arg-type]
        assert method.starts_as_identity
        inlay.attach(model, method)
        assert torch.equal(logits(model, batch), before)
        scramble(model)
        assert not torch.equal(logits(model, batch), before)


def test_small_random_start_is_near_the_base_but_not_at_it() -> None:
    model = build("bert")
    batch = batch_for(model)
    before = logits(model, batch)
    method = SerialAdapter(init_std=1e-3)
    assert not method.starts_as_identity
    inlay.attach(model, method)
    change = (logits(model, batch) - before).abs().max()
    assert 0 < change < 1e-3


def test_starting_values() -> None:
    model = build("bert", hidden_size=256, intermediate_size=64)
    inlay.attach(model, SerialAdapter(), name="h")
    inlay.attach(model, SerialAdapter("pfeiffer"), name="p")
    inlay.attach(model, SerialAdapter("pfeiffer", rank=64, init="lora"), name="l")
    houlsby, pfeiffer, lora = (bottlenecks(model, n)[0] for n in "hpl")
    assert houlsby.down.shape == (64, 256) and pfeiffer.down.shape == (16, 256)
    assert houlsby.down.abs().max() <= 2e-2 and houlsby.up.std() == pytest.approx(0.88e-2, rel=0.05)
    assert pfeiffer.down.std() == pytest.approx(0.02, rel=0.05) and pfeiffer.up.abs().max() > 4e-2
    assert lora.down.abs().max() <= 256**-0.5 and lora.down.std() == pytest.approx((3 * 256) ** -0.5, rel=0.05)
    assert not lora.up.any() and not any(d.down_bias.any() or d.up_bias.any() for d in (houlsby, pfeiffer, lora))


def test_pfeiffer_has_at_least_one_unit() -> None:
    model = build("bert", hidden_size=8, intermediate_size=8)
    inlay.attach(model, SerialAdapter("pfeiffer"))
    assert bottlenecks(model)[0].down.shape == (1, 8)


def test_houlsby_on_a_post_norm_model() -> None:
    """LN(x + A(drop(W_o attn))) and LN(a + A(drop(FFN))), with learned differences on every norm."""
    model, base, batch = pair("bert", SerialAdapter(rank=4))
    before = logits(base, batch)
    gelu = lambda h: F.gelu(h, approximate="tanh")  # noqa: E731
    sublayers = [m for layer in base.bert.encoder.layer for m in (layer.attention.output, layer.output)]
    for delta, module in zip(bottlenecks(model), sublayers_in_order(model, sublayers), strict=True):
        module.dropout.register_forward_hook(lambda m, a, y, d=delta: y + z(d, y, gelu))
    for site, delta in need_state(model).adapter_of("default").placed:
        if site.kind == "norm":
            norm = base.get_submodule(site.name)
            norm.weight.data += delta.weight.data
            norm.bias.data += delta.bias.data
    torch.testing.assert_close(logits(model, batch), logits(base, batch), **DOUBLE)
    assert not torch.allclose(logits(model, batch), before)


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
    torch.testing.assert_close(logits(model, batch), logits(base, batch), **DOUBLE)


def test_houlsby_on_an_encoder_decoder_leaves_cross_attention_alone() -> None:
    model, base, batch = pair("t5", SerialAdapter(rank=4, act="relu", train_layernorms=False))
    placed = need_state(model).adapter_of("default").placed
    assert len(placed) == 2 * 2 + 2 * 2 and not any(site.cross for site, _ in placed)
    for site, delta in placed:
        block = getattr(base, site.side).block[site.layer]
        layer = block.layer[0 if site.role == "attention" else -1]
        layer.dropout.register_forward_hook(lambda m, a, y, d=delta: y + z(d, y))
    torch.testing.assert_close(logits(model, batch), logits(base, batch), **DOUBLE)


def test_houlsby_reads_the_output_before_the_residual() -> None:
    """With the sublayer's last projection zeroed, the bottleneck sees exactly that projection's bias."""
    model = build("bert")
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight.data.zero_()
    dense.bias.data.normal_()
    inlay.attach(model, SerialAdapter(targets=["ffn"], layers=[0]))
    seen: list[Tensor] = []
    bottlenecks(model)[0].register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    logits(model, batch_for(model))
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
    torch.testing.assert_close(logits(model, batch), logits(base, batch), **DOUBLE)
    assert (logits(model, batch) - logits(naive, batch)).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pfeiffer_on_a_pre_norm_model_reads_the_residual_stream(family: str) -> None:
    """Each block gives out + z(out), out being what it gives without the adapter."""
    model, base, batch = pair(family, SerialAdapter("pfeiffer", rank=4))
    layers = base.model.layers if family == "llama" else base.transformer.h
    for layer, delta in zip(layers, bottlenecks(model), strict=True):
        layer.register_forward_hook(lambda m, a, out, d=delta: _first(out, lambda o: o + z(d, o)))
    torch.testing.assert_close(logits(model, batch), logits(base, batch), **DOUBLE)


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
    torch.testing.assert_close(logits(model, batch), logits(base, batch), **DOUBLE)


def test_two_pfeiffer_adapters_form_an_onion() -> None:
    """The second reads LN(f + z₁ + a): what the block gives with the first."""
    model = build("bert", dtype=torch.float64)
    base, batch = copy.deepcopy(model), batch_for(model)
    for name in ("one", "two"):
        inlay.attach(model, SerialAdapter("pfeiffer", rank=4), name=name)
    scramble(model)
    both = zip(base.bert.encoder.layer, bottlenecks(model, "one"), bottlenecks(model, "two"), strict=True)
    for layer, one, two in both:

        def again(module: Any, args: Any, out: Tensor, one: Any = one, two: Any = two) -> Tensor:
            total = module.dense(args[0]) + args[1]
            total = total + z(one, module.LayerNorm(total))
            return module.LayerNorm(total + z(two, module.LayerNorm(total)))

        layer.output.register_forward_hook(again)
    torch.testing.assert_close(logits(model, batch), logits(base, batch), **DOUBLE)


@pytest.mark.parametrize("scale", [2.5, "learned", "channel"])
def test_scale_multiplies_the_branch(scale: Any) -> None:
    model = build("bert", dtype=torch.float64)
    inlay.attach(model, SerialAdapter("pfeiffer", rank=4, scale=scale))
    scramble(model)
    delta = bottlenecks(model)[0]
    h = torch.randn(2, 3, 32, dtype=torch.float64)
    factor = torch.as_tensor(delta.scale)
    assert factor.numel() == {"learned": 1, "channel": 32}.get(scale, 1)
    torch.testing.assert_close(delta.branch(h), z(delta, h) * factor, **DOUBLE)


def test_dropout_acts_on_the_branch_in_training_only() -> None:
    model = build("bert")
    inlay.attach(model, SerialAdapter("pfeiffer", rank=4, dropout=0.5))
    scramble(model)
    seen: list[Tensor] = []
    delta = bottlenecks(model)[0]
    delta.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    batch = batch_for(model)
    logits(model, batch)
    assert not (seen[-1] == 0).any()
    delta.train()
    logits(model, batch)
    dropped = seen[-1] == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(seen[-1][~dropped], 2 * seen[0][~dropped])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_only_the_adapter_learns_and_detach_leaves_no_trace(placement: str) -> None:
    model = build("bert")
    batch = batch_for(model, labels=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = logits(model, batch)
    inlay.attach(model, SerialAdapter(placement, rank=4), train=("head",))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model), weight_decay=0.1)
    model(**batch).loss.backward()
    inlay.check_training(model, optimizer)
    norms = [n for n, p in model.named_parameters() if p.grad is not None and "LayerNorm.inlay" in n]
    assert len(norms) == (2 * 5 if placement == "houlsby" else 0)
    optimizer.step()
    assert not torch.equal(logits(model, batch), first)
    inlay.detach(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model, batch), first)


def test_weight_decay_spares_biases_norms_and_scales() -> None:
    model = build("bert")
    inlay.attach(model, SerialAdapter(scale="learned"))
    matrices, vectors = inlay.parameter_groups(model)
    assert "weight_decay" not in matrices and vectors["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in matrices["params"]) and len(matrices["params"]) == 4 * 2
    assert all(p.ndim == 1 for p in vectors["params"]) and len(vectors["params"]) == 4 * 3 + 5 * 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("family", "placement"), [("llama", "houlsby"), ("llama", "pfeiffer"), ("bert", "pfeiffer")])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, placement: str, reentrant: bool) -> None:
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    model = build(family, dtype=torch.float64, **changes)
    inlay.attach(model, SerialAdapter(placement, rank=4))  # type: ignore[arg-type]
    scramble(model)
    model.train()
    batch = batch_for(model, labels=True)
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, batch)
    assert expected.keys() == found.keys() and len(expected) >= 8
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **DOUBLE)


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_of_a_batch_take_their_own_adapters(placement: str) -> None:
    model = build("bert", dtype=torch.float64)
    for name in ("fr", "de"):
        inlay.attach(model, SerialAdapter(placement, rank=4), name=name)  # type: ignore[arg-type]
    scramble(model)
    batch = batch_for(model)
    alone = []
    for row, names in enumerate((("fr",), ("de",), ())):
        with inlay.use(model, *names):
            alone.append(logits(model, batch)[row])
    with inlay.route(model, ["fr", "de", None]):
        torch.testing.assert_close(logits(model, batch), torch.stack(alone), **DOUBLE)
    assert not torch.allclose(alone[0], alone[2])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_generation_with_a_cache_equals_full_forwards(placement: str) -> None:
    model = build("llama")
    inlay.attach(model, SerialAdapter(placement, rank=4))  # type: ignore[arg-type]
    scramble(model, std=0.5)
    batch = batch_for(model, rows=2)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :3] = 0
    found = [
        model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None, **settings)
        for settings in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with inlay.use(model):
        assert not torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None), found[0])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_learns(placement: str) -> None:
    """Sixty AdamW steps at the method's own rate on one batch, the head frozen."""
    model = build("bert")
    inlay.attach(model, SerialAdapter(placement, rank=16), seed=0)  # type: ignore[arg-type]
    batch = batch_for(model, rows=8, labels=True)
    optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
    losses = []
    for _ in range(60):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < LEARNS[placement] * losses[0]


LEARNS = {"houlsby": 0.8, "pfeiffer": 0.9}


def test_norms_train_where_targets_of_your_own_name_them() -> None:
    model = bert_base()
    kinds = lambda **s: set(inlay.plan(model, SerialAdapter(**s)).parts[0].kinds)  # noqa: E731
    assert kinds(targets=["ffn"]) == {"ffn"}
    assert kinds(targets=["ffn", "norm"]) == {"ffn", "norm"}
    assert kinds(layers="0-2") == {"attention", "ffn", "norm"}
    assert SerialAdapter(targets=["ffn"]).train_layernorms is False


def test_settings_survive_being_written_down() -> None:
    for method in (SerialAdapter(), SerialAdapter("pfeiffer", rank=8), SerialAdapter(targets=["ffn", "norm"])):
        assert SerialAdapter(**method.to_dict()) == method


@pytest.mark.parametrize(
    ("targets", "saw"),
    [(["ffn"], r"train_layernorms=True: \['sublayer'\]"), (["norm"], r"targets=\('norm',\).*\['norm'\]")],
)
def test_refuses_targets_that_contradict_the_settings(targets: list[str], saw: str) -> None:
    with pytest.raises(TargetError, match=saw):
        inlay.attach(build("bert"), SerialAdapter(targets=targets, train_layernorms=True))


def test_refuses_a_residual_that_is_not_found() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64, "encoder_ffn_dim": 16,
             "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    model = BartForConditionalGeneration(BartConfig(**sizes, max_position_embeddings=16))
    with pytest.raises(TargetError, match='use placement="houlsby"'):
        inlay.attach(model, SerialAdapter("pfeiffer", targets=["cross_attention"]))


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
