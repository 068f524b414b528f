"""Virtual tokens in causal decoders: keys and values at the positions before the text's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hard_prompts import (
    CLOSE,
    GREEDY,
    SMALL,
    WORDS,
    lively,
    padded,
    positions,
    rows_of,
    seeded,
    wake,
    with_words,
)
from torch import Tensor, nn
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

import inlay
from inlay.errors import StateError
from inlay.testing.effects import gradients_of, output
from inlay.testing.models import batch_for, build
from inlay.testing.neighbours import KitLowRank
from inlay.testing.tools import shake
from inlay_prompt import PromptTuning

OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 64,
       "max_position_embeddings": 64, "pad_token_id": 1, "init_std": 0.2,
       "word_embed_proj_dim": 16}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64, "initializer_range": 0.2,
       "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: lively("llama"),
    "qwen": lambda: lively("qwen"),
    "gpt2": lambda: lively("gpt2"),
    "gpt_neox": lambda: seeded(lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))),
    "opt": lambda: seeded(lambda: OPTForCausalLM(OPTConfig(**OPT))),
    "biogpt": lambda: seeded(lambda: BioGptForCausalLM(BioGptConfig(**SMALL))),
    "gpt_bigcode": lambda: seeded(lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**GPT))),
}
METHOD = PromptTuning(length=4, tokens=tuple(WORDS.tolist()))


def placed_at(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "position_ids": positions(batch)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_words_act_as_words(name: str, attention: str) -> None:
    model = MODELS[name]()
    model.set_attn_implementation(attention)  # type: ignore[operator]
    inlay.attach(model, METHOD)
    for left in (False, True):
        batch = padded([7, 3, 5], left=left)
        longer = with_words(batch)
        with inlay.use(model):
            wanted, plain = output(model, placed_at(longer)), output(model, placed_at(batch))
        found, real = output(model, placed_at(batch)), batch["attention_mask"].bool()
        text = longer["attention_mask"].cumsum(1).gt(4) & longer["attention_mask"].bool()
        torch.testing.assert_close(found[real], wanted[text], **CLOSE)
        assert (found - plain)[real].abs().max() > 1e-2
    torch.testing.assert_close(output(model, {"input_ids": padded([7])["input_ids"]})[0, :7],
                               output(model, padded([7]))[0], **CLOSE)  # fmt: skip


def as_the_catalogue_says(model: nn.Module, batch: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Return a model's logits with rows in its input, its positions shifted, its mask longer."""
    ids, mask, count = batch["input_ids"], batch["attention_mask"], len(rows)
    size = len(ids)
    embedded = model.get_input_embeddings()(ids)  # type: ignore[operator]
    own = torch.arange(count).expand(size, -1)
    out: Tensor = model(
        inputs_embeds=torch.cat([rows.expand(size, -1, -1), embedded], dim=1),
        attention_mask=torch.cat([mask.new_ones(size, count), mask], dim=1),
        position_ids=torch.cat([own, positions(batch) + count], dim=1),
    ).logits
    return out[:, count:]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_as_the_catalogue_says(name: str) -> None:
    """Values and gradients, with a loss over the text's own tokens, the first left out."""
    model = MODELS[name]()
    inlay.attach(model, PromptTuning(length=3, init="uniform"), seed=1)
    batch = padded([7, 7, 7])
    out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    rows = rows_of(model).detach().clone().requires_grad_()
    with inlay.use(model):
        wanted = as_the_catalogue_says(model, batch, rows)
        nn.functional.cross_entropy(
            wanted[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
        ).backward()
    torch.testing.assert_close(out.logits, wanted, **CLOSE)
    torch.testing.assert_close(rows_of(model).grad, rows.grad, rtol=1e-4, atol=1e-6)
    assert bool((rows.grad.abs().sum(1) > 0).all())
    inlay.check_training(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_go_through_the_stack_they_are_in(name: str) -> None:
    model, twin = MODELS[name](), MODELS[name]()
    inlay.attach(model, KitLowRank(rank=2) + PromptTuning(length=3), "fr", seed=0)
    inlay.attach(twin, KitLowRank(rank=2), "fr", seed=0)
    wake(model), wake(twin)
    batch = padded([7, 3])
    with torch.no_grad():
        wanted = as_the_catalogue_says(twin, batch, rows_of(model, "fr/prompt_tuning"))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(output(model, placed_at(batch))[real], wanted[real], **CLOSE)


# -- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False},
     {"num_beams": 2, "num_return_sequences": 2}],
    ids=["greedy", "beams", "static", "uncached", "both beams"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generation_with_words_as_prompt(name: str, options: dict[str, Any]) -> None:
    """What the plain model makes of [w; text], padded on the left."""
    model = MODELS[name]()
    inlay.attach(model, METHOD)
    batch, settings = padded([6, 2, 5], left=True), GREEDY | {"disable_compile": True} | options
    with inlay.use(model):
        wanted = model.generate(**with_words(batch), **settings)[:, 10:]
        plain = model.generate(**batch, **settings)[:, 6:]
    found = model.generate(**batch, **settings)[:, 6:]
    assert torch.equal(found, wanted)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_cached_generation_is_the_argmax_of_whole_calls(name: str) -> None:
    """Rows that are no words, a first text of one token, and a penalty on the text's own tokens alone."""
    model = MODELS[name]()
    inlay.attach(model, PromptTuning(length=3, init="uniform"), seed=1)
    for penalty in (1.0, 1.8):
        batch = padded([4, 1, 3], left=True)
        found = model.generate(**batch, **GREEDY, repetition_penalty=penalty)
        rows = rows_of(model).detach()
        for _ in range(6):
            with inlay.use(model), torch.no_grad():
                last = as_the_catalogue_says(model, batch, rows)[:, -1]
            padding = batch["attention_mask"].argmax(1)
            penalise = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=padding)
            scores = penalise(batch["input_ids"], last)
            ids = torch.cat([batch["input_ids"], scores.argmax(-1, keepdim=True)], 1)
            mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
            batch = {"input_ids": ids, "attention_mask": mask}
        assert torch.equal(found, batch["input_ids"]), penalty


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_assisted_decoding_gives_the_same_text(name: str) -> None:
    """A smaller model proposes several tokens, which enter a filled cache as one chunk."""
    model, assistant = MODELS[name](), MODELS[name]()
    inlay.attach(model, PromptTuning(length=3, init="uniform"), seed=1)
    batch = padded([5])
    wanted = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, assistant_model=assistant), wanted)
    with inlay.use(model):
        assert not torch.equal(model.generate(**batch, **GREEDY), wanted)


def test_choosing_another_prompt_on_one_cache() -> None:
    """What is kept for a generation is kept per stack."""
    model = MODELS["gpt2"]()
    for name in ("fr", "de"):
        inlay.attach(model, PromptTuning(length=len(name) + (name == "de")), name, seed=ord(name[0]))
    ids = batch_for(model)["input_ids"]
    cache = DynamicCache(config=model.config)
    with inlay.use(model, "fr"):
        output(model, {"input_ids": ids[:, :4], "past_key_values": cache})
    fresh = copy.deepcopy(cache)
    with inlay.use(model, "de"):
        found = output(model, {"input_ids": ids[:, 4:], "past_key_values": cache})
        assert torch.equal(found, output(model, {"input_ids": ids[:, 4:], "past_key_values": fresh}))


def test_the_rows_run_once_per_generation() -> None:
    model = MODELS["llama"]()
    inlay.attach(model, PromptTuning(length=3), seed=0)
    calls: list[int] = []
    for module in model.modules():
        if type(module).__name__ == "Rows":
            module.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**padded([4, 2], left=True), **GREEDY)
    assert calls == [1]


# -- what stands around them -----------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_classifier_finds_its_last_real_token(name: str, left: bool) -> None:
    if name == "llama":
        model = seeded(lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)))
    else:
        model = seeded(lambda: GPT2ForSequenceClassification(GPT2Config(**GPT, num_labels=3)))
    inlay.attach(model, METHOD)
    batch = padded([7, 3, 5], left=left)
    found = output(model, placed_at(batch))
    for row in range(3):
        own = {
            k: v[row : row + 1][batch["attention_mask"][row : row + 1].bool()][None] for k, v in batch.items()
        }
        with inlay.use(model):
            alone, plain = output(model, with_words(own)), output(model, own)
        torch.testing.assert_close(found[row : row + 1], alone, **CLOSE)
        assert (alone - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_different_length_in_one_batch(name: str) -> None:
    model = MODELS[name]()
    inlay.attach(model, PromptTuning(length=2), "short", seed=0, activate=False)
    inlay.attach(model, KitLowRank(rank=2) + PromptTuning(length=5), "long", seed=1, activate=False)
    wake(model)
    batch, names = padded([7, 3, 5, 6], left=True), ["long", None, "short", "long"]
    with inlay.route(model, names):
        together = output(model, placed_at(batch))
        written = [model.generate(**batch, **(GREEDY | way)) for way in ({}, {"num_beams": 2})]
    for row, stack in enumerate(names):
        own = {k: v[row : row + 1] for k, v in batch.items()}
        with inlay.route(model, [stack]) if stack else inlay.use(model):
            alone = output(model, placed_at(own))
            for found, way in zip(written, ({}, {"num_beams": 2}), strict=True):
                assert torch.equal(found[row], model.generate(**own, **(GREEDY | way))[0])
        real = own["attention_mask"].bool()
        torch.testing.assert_close(together[row : row + 1][real], alone[real], **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_checkpointing_of_a_routed_batch(family: str, reentrant: bool) -> None:
    model = lively(family, **({"dropout_rate": 0.0} if family == "t5" else {}))
    inlay.attach(model, PromptTuning(length=3), "fr", seed=0)
    inlay.attach(model, KitLowRank(rank=2) + PromptTuning(length=2), "de", seed=1)
    wake(model)
    model.eval()
    batch = batch_for(model, labels=True)

    def run() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with inlay.route(model, ["fr", "de", None]):
            loss = model(**batch).loss
        loss.backward()
        return gradients_of(model)

    wanted = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True  # blocks are recomputed, nothing drops out
    found = run()
    assert {n.split(".")[-1] for n in wanted} >= {"rows", "A", "B"}
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE)


@pytest.mark.parametrize(("family", "length", "tokens"), [("gpt2", 64, 1), ("gpt2", 60, 5), ("bert", 70, 1)])
def test_more_tokens_than_positions_are_refused(family: str, length: int, tokens: int) -> None:
    model = build(family)
    inlay.attach(model, PromptTuning(length=length))
    with pytest.raises(StateError, match="take more positions than the model has") as refused:
        output(model, {"input_ids": torch.ones(1, 5, dtype=torch.long)})
    assert f"{length} virtual tokens, {tokens} of the text, 64 positions" in str(refused.value)


def test_the_table_of_positions_may_learn_too() -> None:
    """What it gives beside a prompt is what a model with those values in it gives."""
    model = MODELS["gpt2"]()
    inlay.attach(model, PromptTuning(length=3), "a", train=("wpe",))
    inlay.attach(model, PromptTuning(length=5), "b", activate=False)
    shake(model)
    adapted = output(model, padded([3, 5]))
    with inlay.route(model, ["a", "b"]):
        routed = output(model, padded([3, 5]))
    with inlay.use(model, "b"):
        other = output(model, padded([3, 5]))
    torch.testing.assert_close(routed, torch.stack([adapted[0], other[1]]), **CLOSE)
    inlay.set_trainable(model)
    inlay.detach(model, "b")
    inlay.merge(model, ["a/trained"])
    torch.testing.assert_close(output(model, padded([3, 5])), adapted, **CLOSE)
