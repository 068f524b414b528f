"""DConv against its equation written out, and whatever way the tokens come: padded, cached, in beams."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError, StateError
from inlay.testing.decoding import stepwise, tokens, whole
from inlay.testing.tools import distance, lively, shake
from inlay_dconv import DConv

CLOSE = 1e-5
DECODERS = ("llama", "gpt2", "t5", "mistral")


def convolved(y: Tensor, taps: Tensor, real: Tensor | None = None) -> Tensor:
    """Return y_t + Σ_j w_j ⊙ y_(t−j), token by token; padding counts as zeros."""
    out = y.clone()
    for row in range(y.shape[0]):
        for t in range(y.shape[1]):
            for j in range(len(taps)):
                if t - j >= 0 and (real is None or real[row, t - j]):
                    out[row, t] += taps[j] * y[row, t - j]
    return out


def adapted(family: str, **settings: Any) -> nn.Module:
    """Return a lively model with a convolution that acts."""
    model = lively(family)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
    inlay.attach(model, DConv(**settings), name="a")
    shake(model)
    return model


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, **options)


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Return the logits of each new token."""
    out = generated(model, ids, output_logits=True, return_dict_in_generate=True, **options)
    return torch.stack(out.logits, dim=1)


def test_it_is_the_equation() -> None:
    """A BERT's query projection, with padding in front: what it gives is the sum written out."""
    model = adapted("bert", size=4, targets=("query",), layers=(0,))
    query = model.bert.encoder.layer[0].attention.self.query
    seen: list[tuple[Tensor, Tensor]] = []
    query.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        model(input_ids=tokens(3, 6), attention_mask=mask)
        x, found = seen[0]
        plain = x @ query.weight.T + query.bias
        taps = next(p for name, p in model.named_parameters() if name.endswith(".taps"))
        wanted = convolved(plain, taps, mask.bool())
    for row in range(3):
        torch.testing.assert_close(found[row][mask[row] == 1], wanted[row][mask[row] == 1])
    assert distance(found, plain) > 0.05


def test_rows_of_one_token_see_themselves_alone() -> None:
    layer = nn.Sequential(nn.Linear(4, 6))
    inlay.attach(layer, DConv(targets=("0",)))
    shake(layer)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    taps = next(p for name, p in layer.named_parameters() if name.endswith(".taps"))
    with inlay.use(layer):
        y = layer(x)
    torch.testing.assert_close(layer(x), (1 + taps[0]) * y)


@pytest.mark.parametrize("family", DECODERS)
def test_chunks_through_a_cache_equal_one_call(family: str) -> None:
    """Whoever makes the cache: the first call, or the caller."""
    model, ids = adapted(family, size=4), tokens()
    expected = whole(model, ids)
    with inlay.use(model):
        assert distance(expected, whole(model, ids)) > 0.05
    for chunks in ((5, 2, *[1] * 5), (1, 1, 10), (12,)):
        assert distance(stepwise(model, ids, None, chunks), expected) < CLOSE


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_a_cache_equals_without(family: str, options: dict[str, Any]) -> None:
    model, ids = adapted(family, size=4), tokens(length=7)
    plain = {k: v for k, v in options.items() if k != "cache_implementation"}
    found = generated(model, ids, **options)
    assert torch.equal(found, generated(model, ids, use_cache=False, **plain))
    assert distance(logits(model, ids, **options), logits(model, ids, use_cache=False, **plain)) < CLOSE


def test_routed_beams_carry_their_own_past() -> None:
    """Rows under the convolution, under another, and bare, each with its beams, equal each row alone."""
    model, ids = adapted("llama", size=4), tokens(length=7)
    inlay.attach(model, DConv(size=3), name="b", seed=1)
    shake(model, "b", seed=5)
    names = ["a", None, "b"]
    with inlay.route(model, names):
        together = generated(model, ids, num_beams=3)
    for row, name in enumerate(names):
        with inlay.use(model, *([name] if name else [])):
            alone = generated(model, ids[row : row + 1], num_beams=3)
        assert torch.equal(together[row : row + 1], alone), name


def test_candidates_that_are_rejected_leave_no_trace() -> None:
    """Prompt lookup proposes tokens and crops the cache after those it rejects."""
    model, ids = adapted("llama", size=4), tokens(rows=1, length=4).repeat(1, 3)
    assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3), generated(model, ids))


def test_left_padded_rows_generate_what_they_do_alone() -> None:
    model, ids, lengths = adapted("llama", size=4), tokens(length=7), (3, 5, 7)
    padded, mask = ids.clone(), torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padded[row, :-length], mask[row, :-length] = 5, 0  # any token: that of padding embeds as zeros
    for cache in ("dynamic", "static"):
        together = logits(model, padded, attention_mask=mask, cache_implementation=cache)
        for row, length in enumerate(lengths):
            alone = logits(model, ids[row : row + 1, -length:])
            assert distance(together[row], alone[0]) < CLOSE, (cache, row)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_goes_its_own_way(again: Any) -> None:
    """One prompt, read once, and two continuations."""
    model, ids = adapted("llama", size=4), tokens()
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
        first = model(ids[:, 6:], past_key_values=again(cache)).logits
        other = model(ids[:, 6:].flip(1), past_key_values=again(cache)).logits
        second = model(ids[:, 6:], past_key_values=cache).logits
    expected = whole(model, ids)[:, 6:]
    assert distance(first, expected) < CLOSE
    assert distance(second, expected) < CLOSE
    assert distance(other, expected) > 0.05


def test_a_cache_filled_without_it_is_refused() -> None:
    model, ids = adapted("llama"), tokens()
    with torch.no_grad(), inlay.use(model):
        cache = model(ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(
        StateError, match=r"cache was filled while .*\n.*: 5 tokens in the cache, 0 seen by it"
    ):
        model(ids[:, 5:], past_key_values=cache)


@pytest.mark.parametrize("size", [0, 17, 1.5])
def test_a_size_out_of_range_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="size"):
        DConv(size=size)
