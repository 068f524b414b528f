"""Parallel adapters against the paper: counts, equations in plain torch, what they read, scaling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel, T5Config, T5Model

import inlay
from inlay.authoring import TargetError
from inlay.stack import need_state
from inlay.testing.effects import output
from inlay.testing.layers import fit, gradients
from inlay.testing.models import batch_for, build
from inlay.testing.tools import shake
from inlay_adapter import ParallelAdapter, SerialAdapter

DOUBLE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def deltas(model: nn.Module) -> list[Any]:
    return [delta for _, delta in need_state(model).adapter_of("default").placed]


def z(delta: Any, h: Tensor) -> Tensor:
    """The paper's formula with a number or learned numbers as scale, without a skip."""
    return delta.scale * (torch.relu(h @ delta.down.T + delta.down_bias) @ delta.up.T + delta.up_bias)


def adapted(family: str, method: ParallelAdapter) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Return (adapted and scrambled, an untouched copy of its base, a batch), in float64."""
    model = build(family, dtype=torch.float64)
    base = copy.deepcopy(model)
    inlay.attach(model, method, seed=0)
    shake(model, size=1.0)
    return model, base, batch_for(model)


def first_ffn(family: str, method: Any, *, down: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (z, y + z) of the first feed-forward of a tiny Llama whose down projection was scaled."""
    model = build(family, dtype=torch.float64)
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight.data *= down
    inlay.attach(model, method, seed=0)
    shake(model, size=1.0)
    seen: list[Tensor] = []
    deltas(model)[0].register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    mlp.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    output(model, batch_for(model))
    return seen[0], seen[1]


def test_counts_of_the_paper() -> None:
    """24·P(1024, 512) on a model of BART-large's width with 24 layers, on one stack or split over two."""
    one_stack = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    two_stacks = {"d_model": 1024, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 16}
    with torch.device("meta"):
        models = BertModel(BertConfig(**one_stack)), T5Model(T5Config(**two_stacks))
    for model in models:
        assert inlay.plan(model, ParallelAdapter()).parameters == 24 * 1_050_112 == 25_202_688
        assert inlay.plan(model, ParallelAdapter(scale="learned")).parameters == 25_202_688 + 24


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "vit"])
def test_zero_up_is_the_base_bit_for_bit(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build(family, dtype=dtype)
        batch = batch_for(model)
        before = output(model, batch)
        method = ParallelAdapter(rank=8)
        assert method.starts_as_identity
        inlay.attach(model, method)
        assert torch.equal(output(model, batch), before)
        shake(model, size=1.0)
        assert not torch.equal(output(model, batch), before)


def test_reads_what_a_post_norm_feed_forward_reads() -> None:
    """LN(a + drop(FFN(a)) + z(a)), with a number as scale and with a learned one."""
    for scale in (4.0, "learned", "channel"):
        model, base, batch = adapted("bert", ParallelAdapter(rank=4, scale=scale))  # type: ignore[arg-type]
        for layer, delta in zip(base.bert.encoder.layer, deltas(model), strict=True):

            def again(module: Any, args: Any, out: Tensor, delta: Any = delta) -> Tensor:
                return module.LayerNorm(module.dense(args[0]) + z(delta, args[1]) + args[1])

            layer.output.register_forward_hook(again)
        torch.testing.assert_close(output(model, batch), output(base, batch), **DOUBLE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_reads_the_normalised_input_of_a_pre_norm_feed_forward(family: str) -> None:
    model, base, batch = adapted(family, ParallelAdapter(rank=4))
    for module, delta in zip(feed_forwards(base), deltas(model), strict=True):
        module.register_forward_hook(lambda m, args, y, d=delta: y + z(d, args[0]))
    torch.testing.assert_close(output(model, batch), output(base, batch), **DOUBLE)


def feed_forwards(model: nn.Module) -> list[Any]:
    kinds = ("LlamaMLP", "GPT2MLP", "T5DenseGatedActDense")
    return [m for m in model.modules() if type(m).__name__ in kinds]


def test_reads_the_residual_where_asked() -> None:
    """adapter-hub/adapters' reading: another function on pre-norm models, the same on post-norm ones."""
    for family in ("llama", "bert"):
        model, base, batch = adapted(family, ParallelAdapter(rank=4, input="residual"))
        normed, _, _ = adapted(family, ParallelAdapter(rank=4))
        if family == "llama":
            for layer, delta in zip(base.model.layers, deltas(model), strict=True):
                stream: list[Tensor] = []
                norm = layer.post_attention_layernorm
                norm.register_forward_pre_hook(lambda m, a, s=stream: s.append(a[0]))
                layer.mlp.register_forward_hook(lambda m, a, y, d=delta, s=stream: y + z(d, s.pop()))
            torch.testing.assert_close(output(model, batch), output(base, batch), **DOUBLE)
            assert (output(model, batch) - output(normed, batch)).abs().max() > 1e-3
        else:
            torch.testing.assert_close(output(model, batch), output(normed, batch), **DOUBLE)


def test_beside_attention() -> None:
    model, base, batch = adapted("llama", ParallelAdapter(rank=4, targets=["attention", "ffn"]))
    for site, delta in need_state(model).adapter_of("default").placed:
        layer = base.model.layers[site.layer]
        if site.role == "ffn":
            layer.mlp.register_forward_hook(lambda m, a, y, d=delta: y + z(d, a[0]))
        else:
            layer.self_attn.register_forward_hook(
                lambda m, a, kw, y, d=delta: (y[0] + z(d, kw["hidden_states"]), y[1]), with_kwargs=True
            )
    torch.testing.assert_close(output(model, batch), output(base, batch), **DOUBLE)


def test_a_linear_branch_has_the_rank_of_its_bottleneck() -> None:
    branch, _ = first_ffn("llama", ParallelAdapter(rank=3, act="identity"))
    rows = branch.flatten(0, 1)
    singular = torch.linalg.svdvals(rows - rows.mean(0))  # without the output bias
    assert rows.shape[0] > 8
    assert singular[2] > 1e-3
    assert singular[3] < 1e-12


def test_doubling_the_scale_doubles_the_branch_exactly() -> None:
    assert torch.equal(
        first_ffn("llama", ParallelAdapter(rank=4, scale=8.0))[0],
        2 * first_ffn("llama", ParallelAdapter(rank=4, scale=4.0))[0],
    )


def test_does_not_depend_on_the_weights_it_stands_beside() -> None:
    """A zeroed feed-forward leaves exactly z; a serial adapter's z follows the feed-forward."""
    branch, with_ffn = first_ffn("llama", ParallelAdapter(rank=4))
    same, alone = first_ffn("llama", ParallelAdapter(rank=4), down=0.0)
    assert torch.equal(branch, same)
    assert torch.equal(alone, branch)
    assert not torch.equal(with_ffn, branch)
    serial = SerialAdapter(rank=4, targets=["ffn"])
    assert not torch.equal(first_ffn("llama", serial)[0], first_ffn("llama", serial, down=0.0)[0])


def test_dropout_acts_on_the_activation_in_training_only() -> None:
    model, _, batch = adapted("llama", ParallelAdapter(rank=4, dropout=0.5))
    delta = deltas(model)[0]
    seen: list[Tensor] = []
    delta.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    for _ in range(2):
        output(model, batch)
    assert torch.equal(seen[0], seen[1])
    delta.train()
    output(model, batch)
    h = torch.randn(5, 32, dtype=torch.float64)
    torch.manual_seed(0)
    mask = torch.nn.functional.dropout(torch.ones(5, 4, dtype=torch.float64), 0.5)
    torch.manual_seed(0)
    inner = torch.relu(h @ delta.down.T + delta.down_bias) * mask
    torch.testing.assert_close(delta.branch(h, 0.5), 4 * (inner @ delta.up.T + delta.up_bias), **DOUBLE)
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reads", ["normed", "residual"])
def test_gradient_checkpointing_gives_the_same_gradients(reads: Any, reentrant: bool) -> None:
    model, _, _ = adapted("llama", ParallelAdapter(rank=4, dropout=0.0, input=reads))
    model.train()
    batch = batch_for(model, labels=True)
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, batch)
    assert expected.keys() == found.keys()
    assert len(expected) == 8
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **DOUBLE)


def test_generation_with_a_cache_equals_full_forwards() -> None:
    for family in ("llama", "t5"):
        model = build(family)
        inlay.attach(model, ParallelAdapter(rank=4))
        shake(model, size=2.0)
        batch = batch_for(model, rows=2)
        batch.pop("labels", None)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :3] = 0
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        cached, full = (model.generate(**batch, **settings, use_cache=use) for use in (True, False))
        assert torch.equal(cached, full)


def test_it_learns() -> None:
    """Sixty AdamW steps at the method's own rate on one batch, the head frozen."""
    model = build("bert", initializer_range=0.2)  # with 0.02 a random base passes almost nothing on
    inlay.attach(model, ParallelAdapter(), seed=0)
    batch = batch_for(model, rows=8, labels=True)
    before, after = fit(model, batch)
    assert after < 0.3 * before


def test_refuses_a_residual_that_is_not_found() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64, "encoder_ffn_dim": 16,
             "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    model = BartForConditionalGeneration(BartConfig(**sizes, max_position_embeddings=16))
    with pytest.raises(TargetError, match='use input="normed"'):
        inlay.attach(model, ParallelAdapter(input="residual", targets=["cross_attention"]))


def test_says_why_it_cannot_be_merged() -> None:
    model = build("bert")
    inlay.attach(model, ParallelAdapter(rank=4))
    with pytest.raises(inlay.CannotMerge, match="a bottleneck with a nonlinearity"):
        inlay.merge(model)
