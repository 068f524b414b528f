"""Generation: caches of every kind, beams, padding and routing leave an adapted model's logits alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import RoutingError
from inlay.testing.decoding import arguments, stepwise, tokens, whole
from inlay.testing.tools import distance, lively, shake

transformers = pytest.importorskip("transformers")

LORA, IA3, SERIAL, BITFIT = "lora(rank=4)", "ia3()", "serial_adapter(rank=8)", "bitfit()"
PREFIX = "prefix_tuning(length=3, hidden=16)"
STACKS = {
    "lora": LORA,
    "ia3": IA3,
    "serial": SERIAL,
    "prefix": PREFIX,
    "bitfit": BITFIT,
    "lora-prefix": f"{LORA} + {PREFIX}",
    "prefix-ia3-serial": f"{PREFIX} + {IA3} + {SERIAL}",
    "two-prefixes": f"{PREFIX} + {PREFIX}.named('second')",
    "all": f"{LORA} + {IA3} + {SERIAL} + {PREFIX} + dora(rank=2, targets=['both.output'])",
}
CHANGES: dict[str, dict[str, Any]] = {"llama": {"attention_bias": True, "mlp_bias": True}}
FAMILIES = ("llama", "gpt2", "t5", "mistral")
CASES = [
    pytest.param(family, stack, id=f"{family}-{stack}")
    for family in FAMILIES
    for stack in STACKS
    if not (stack == "bitfit" and family in ("t5", "mistral"))  # these have no bias anywhere
]
CLOSE = 1e-5  # ‖difference‖ / ‖logits‖; float32


def adapted(family: str, *stacks: str, **changes: Any) -> nn.Module:
    """Return a lively model with each of `stacks` attached as a, b, …, all acting."""
    model = lively(family, **{**CHANGES.get(family, {}), **changes})
    model.generation_config.eos_token_id = None
    for seed, (name, stack) in enumerate(zip("abcdef", stacks, strict=False)):
        inlay.attach(model, stack, name=name, seed=seed)
    shake(model)
    return model


@pytest.mark.parametrize(("family", "stack"), CASES)
def test_cached_logits_along_a_forced_sequence_equal_uncached(family: str, stack: str) -> None:
    """A prefill, a two-token chunk and single tokens through the cache give one whole call's logits."""
    model, ids = adapted(family, STACKS[stack]), tokens()
    expected = whole(model, ids)
    with inlay.use(model):
        assert distance(expected, whole(model, ids)) > 0.05
    cached = stepwise(model, ids, None, (5, 2, *[1] * 5))
    assert distance(cached, expected) < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_a_prefix_enters_the_cache(family: str) -> None:
    model, ids = adapted(family, PREFIX), tokens()
    with torch.no_grad():
        cache = model(**arguments(model, ids[:, :4]), use_cache=True).past_key_values
    assert cache.get_seq_length() == 4


def generated(model: nn.Module, ids: Tensor, **options: Any) -> Any:
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    return model.generate(input_ids=ids, **{**settings, **options})


def logits_of(out: Any) -> Tensor:
    return torch.stack(out.logits, dim=1)


def same_generation(a: Any, b: Any) -> None:
    assert torch.equal(a.sequences, b.sequences)
    assert distance(logits_of(a), logits_of(b)) < CLOSE


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "repetition_penalty": 1.5}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_a_cache_equals_without(family: str, options: dict[str, Any]) -> None:
    model, ids = adapted(family, STACKS["all"]), tokens(length=7)
    cached, plain = generated(model, ids, **options), generated(model, ids, use_cache=False, **options)
    same_generation(cached, plain)
    with inlay.use(model):
        assert not torch.equal(generated(model, ids, **options).sequences, plain.sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_gives_what_a_dynamic_one_gives(family: str) -> None:
    model, ids = adapted(family, STACKS["all"]), tokens(length=7)
    same_generation(generated(model, ids, cache_implementation="static"), generated(model, ids))


def test_prompt_lookup_decoding_equals_greedy_decoding() -> None:
    """Assisted decoding crops the cache after rejected candidates."""
    model, ids = adapted("llama", STACKS["all"]), tokens(rows=1, length=4).repeat(1, 3)
    assert torch.equal(
        generated(model, ids, prompt_lookup_num_tokens=3).sequences, generated(model, ids).sequences
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("stack", ["prefix", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_left_padded_rows_equal_each_row_alone(family: str, stack: str, cache: str) -> None:
    model, ids, lengths = adapted(family, STACKS[stack]), tokens(length=7), (3, 5, 7)
    padded, mask = ids.clone(), torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padded[row, :-length], mask[row, :-length] = 0, 0
    together = generated(model, padded, attention_mask=mask, cache_implementation=cache)
    for row, length in enumerate(lengths):
        alone = generated(model, ids[row : row + 1, -length:])
        assert torch.equal(together.sequences[row, 7:], alone.sequences[0, length:])
        assert distance(logits_of(together)[row], logits_of(alone)[0]) < CLOSE


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}],
    ids=["greedy", "beams"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_route_serves_every_row_and_all_its_beams(family: str, options: dict[str, Any]) -> None:
    """n names serve k·n beams: each row gets what it gets alone under its own stack."""
    model, ids = adapted(family, STACKS["lora-prefix"], STACKS["prefix-ia3-serial"]), tokens(length=7)
    names, count = ["a", "b", None], options.get("num_return_sequences", 1)
    with inlay.route(model, names):
        together = generated(model, ids, **options)
    firsts = []
    for row, name in enumerate(names):
        with inlay.use(model, *([name] if name else [])):
            alone = generated(model, ids[row : row + 1], **options)
            firsts.append(generated(model, ids[:1], **options).sequences)
        mine = slice(row * count, (row + 1) * count)
        assert torch.equal(together.sequences[mine], alone.sequences)
        if "num_beams" in options:
            assert torch.allclose(together.sequences_scores[mine], alone.sequences_scores, atol=CLOSE)
        else:
            assert distance(logits_of(together)[mine], logits_of(alone)) < CLOSE
    assert not torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[0], firsts[2])


def test_a_route_that_does_not_divide_the_batch_is_refused() -> None:
    model = adapted("llama", LORA)
    with (
        inlay.route(model, ["a", None]),
        pytest.raises(RoutingError, match="leading size 3, the route names 2 rows"),
    ):
        model(input_ids=tokens(rows=3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", [("sdpa", "eager"), ("eager", "sdpa")], ids="-".join)
def test_changing_the_attention_after_attaching_keeps_the_prefix(family: str, path: tuple[str, str]) -> None:
    model, ids = adapted(family, STACKS["lora-prefix"], attn_implementation=path[0]), tokens()
    before = whole(model, ids)
    model.set_attn_implementation(path[1])
    assert model.config._attn_implementation == path[1]
    assert distance(whole(model, ids), before) < CLOSE
    assert distance(stepwise(model, ids, None, (4, 8)), before) < CLOSE
    with inlay.use(model, "a/lora"):
        assert distance(whole(model, ids), before) > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_output_attentions_gives_the_users_own_columns(family: str) -> None:
    """Each row is what is left for the tokens beside the prefix; in layer 0 in the base's proportions."""
    model, ids = adapted(family, PREFIX, attn_implementation="eager"), tokens()
    attend = {"output_attentions": True}
    with torch.no_grad():
        out = model(**arguments(model, ids), **attend)
        with inlay.use(model):
            base = model(**arguments(model, ids), **attend)
    names = ("decoder_attentions", "cross_attentions") if family == "t5" else ("attentions",)
    for name in names:
        assert [w.shape for w in out[name]] == [w.shape for w in base[name]]
        assert all(bool((w.sum(-1) < 0.999).all()) for w in out[name])
    own, plain = out[names[0]][0], base[names[0]][0]
    assert distance(own / own.sum(-1, keepdim=True), plain) < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_output_hidden_states_shows_the_adapted_stream(family: str) -> None:
    model, ids = adapted(family, STACKS["all"]), tokens()
    with torch.no_grad():
        given = arguments(model, ids)
        out = model(**given, output_hidden_states=True)
        plain = model(**given).logits
        with inlay.use(model):
            base = model(**given, output_hidden_states=True)
    name = "decoder_hidden_states" if family == "t5" else "hidden_states"
    states, own = base[name], out[name]
    assert len(own) == len(states) == model.config.num_hidden_layers + 1
    assert torch.equal(out.logits, plain)
    assert torch.equal(own[0], states[0])
    assert all(distance(a, b) > 0.05 for a, b in zip(own[1:], states[1:], strict=True))
    assert distance(model.lm_head(own[-1]), plain) < CLOSE
