"""What a part keeps during a generation: with the cache from its first call on, in the order of its beams."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.authoring import At, Call, Init, Method, OutputDelta, Site, register
from inlay.registry import registry
from inlay.testing.decoding import stepwise, tokens, whole
from inlay.testing.tools import distance, lively, shake

transformers = pytest.importorskip("transformers")

CLOSE = 1e-5
DECODERS = ("llama", "gpt2", "mistral")
SEEN: list[list[list[int]]] = []


class Before(OutputDelta):
    """Δy_t = a ⊙ y_(t−1), with a (d,) zero at the start; what came before the chunk is kept."""

    reads: ClassVar[frozenset[str]] = frozenset({"y"})

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.scale = init.zeros(site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: At) -> Tensor:
        assert isinstance(at.call, Call)
        if (real := at.real(y)) is not None:
            SEEN.append(real.int().tolist())
            y = y * real.unsqueeze(-1)
        first = at.store["last"] if at.call.past_length else torch.zeros_like(y[:, :1])
        at.store["last"] = y[:, -1:]
        return self.scale * torch.cat((first, y[:, :-1]), dim=1)


@dataclass(frozen=True, kw_only=True)
class LooksBack(Method):
    id: ClassVar[str] = "looks_back"
    default_targets: ClassVar[tuple[str, ...]] = ("query", "value")
    reads_call: ClassVar[bool] = True

    def delta(self, site: Site, init: Init) -> Before:
        return Before(site, init)


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    register(LooksBack)
    SEEN.clear()
    yield
    registry.forget(LooksBack)


def adapted(family: str, *names: str) -> nn.Module:
    model = lively(family)
    model.generation_config.eos_token_id = None
    for seed, name in enumerate(names or ("a",)):
        inlay.attach(model, LooksBack(), name, seed=seed)
        shake(model, name, seed=seed)
    return model


def generated(model: Any, ids: Tensor, **options: Any) -> Any:
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    out = model.generate(input_ids=ids, return_dict_in_generate=True, **{**settings, **options})
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("family", DECODERS)
def test_it_goes_with_the_cache_that_the_first_call_makes(family: str) -> None:
    model, ids = adapted(family), tokens()
    expected = whole(model, ids)
    with inlay.use(model):
        assert distance(expected, whole(model, ids)) > 0.05
    assert distance(stepwise(model, ids, None, (5, 2, *[1] * 5)), expected) < CLOSE
    assert distance(stepwise(model, ids, transformers.DynamicCache(), (5, 7)), expected) < CLOSE


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", DECODERS)
def test_beams_take_it_along(family: str, options: dict[str, Any]) -> None:
    model, ids = adapted(family), tokens(length=7)
    sequences, logits = generated(model, ids, **options)
    wanted, plain = generated(model, ids, use_cache=False, **options)
    assert torch.equal(sequences, wanted)
    assert distance(logits, plain) < CLOSE


def test_beams_of_a_routed_batch_take_their_own_rows_along() -> None:
    model, ids, names = adapted("llama", "a", "b"), tokens(length=7), ["a", None, "b"]
    with inlay.route(model, names):
        together, _ = generated(model, ids, num_beams=3)
    for row, name in enumerate(names):
        with inlay.use(model, *([name] if name else [])):
            alone, _ = generated(model, ids[row : row + 1], num_beams=3)
        assert torch.equal(together[row : row + 1], alone), name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_has_its_own(copied: Callable[[Any], Any]) -> None:
    """As in: one prompt, read once, then many continuations."""
    model, ids = adapted("llama"), tokens()
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
        kind = type(cache)
        model(ids[:, 6:].flip(1), past_key_values=copied(cache))
        again = copied(cache)
        found = model(ids[:, 6:], past_key_values=again).logits
        again.reorder_cache(torch.tensor([1, 0, 2]))
    assert distance(found, whole(model, ids)[:, 6:]) < CLOSE
    assert isinstance(again, transformers.DynamicCache)
    assert type(again) is kind
    assert kind.__name__ == "DynamicCache"


def test_a_cache_beside_which_nothing_is_kept_stays_as_it_is() -> None:
    model, ids = lively("llama"), tokens()
    inlay.attach(model, "prefix_tuning(length=3, hidden=16) + lora(rank=2)")
    with torch.no_grad():
        cache = model(ids, past_key_values=transformers.DynamicCache()).past_key_values
    assert type(cache) is transformers.DynamicCache


@pytest.mark.parametrize("family", DECODERS)
def test_padding_is_known_in_static_caches_and_their_sliding_windows(family: str) -> None:
    """Mistral's window is four tokens: its mask has fewer columns than the cache has seen."""
    model, ids, lengths = adapted(family), tokens(length=7), (3, 5, 7)
    padded, mask = ids.clone(), torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padded[row, :-length], mask[row, :-length] = 5, 0  # any token: that of padding embeds as zeros
    together, logits = generated(model, padded, attention_mask=mask, cache_implementation="static")
    assert SEEN[0] == mask.tolist()
    assert SEEN[-1] == [[1], [1], [1]]
    for row, length in enumerate(lengths):
        alone, own = generated(model, ids[row : row + 1, -length:])
        assert torch.equal(together[row, 7:], alone[0, length:])
        assert distance(logits[row], own[0]) < CLOSE
