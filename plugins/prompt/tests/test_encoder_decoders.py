"""Virtual tokens in encoder-decoders: in the encoder, and read by the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hard_prompts import CLOSE, GREEDY, VOCABULARY, WORDS, lively, padded, rows_of, seeded, wake, with_words
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    MarianConfig,
    MarianMTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import inlay
from inlay.errors import StateError
from inlay.testing.neighbours import KitLowRank
from inlay_prompt import PromptTuning

SIZES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 2, "init_std": 0.2}  # fmt: skip
MODELS: dict[str, Callable[..., nn.Module]] = {
    "t5": lambda: lively("t5"),
    "bart": lambda: seeded(
        lambda: BartForConditionalGeneration(BartConfig(**SIZES, forced_eos_token_id=None)), seed=9
    ),
    "scaled bart": lambda: seeded(
        lambda: BartForConditionalGeneration(
            BartConfig(**SIZES, scale_embedding=True, forced_eos_token_id=None)
        )
    ),
    "marian": lambda: seeded(lambda: MarianMTModel(MarianConfig(**SIZES, forced_eos_token_id=None))),
}
METHOD = PromptTuning(length=4, tokens=tuple(WORDS.tolist()))
DECODER = torch.tensor([[2, 9, 30, 17, 8], [2, 40, 3, 12, 21], [2, 5, 6, 7, 33]])


def logits(model: nn.Module, batch: dict[str, Tensor], rows: int = 3) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch, decoder_input_ids=DECODER[:rows]).logits
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_words_act_as_words(name: str, attention: str) -> None:
    model = MODELS[name]()
    model.set_attn_implementation(attention)  # type: ignore[operator]
    inlay.attach(model, METHOD)
    for batch in (padded([7, 3, 5]), padded([5, 5, 5])):
        with inlay.use(model):
            wanted, plain = logits(model, with_words(batch)), logits(model, batch)
        found = logits(model, batch)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert (found - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, {"input_ids": batch["input_ids"]}), found, **CLOSE)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_as_the_catalogue_says(name: str) -> None:
    """Encoder on [P; E], its p + T outputs read by the decoder under a mask of p + T."""
    model = MODELS[name]()
    inlay.attach(model, PromptTuning(length=3, init="uniform"), seed=1)
    batch, rows = padded([7, 3, 5]), rows_of(model).detach()
    found = logits(model, batch)
    with inlay.use(model), torch.no_grad():
        embedded = model.get_encoder().embed_tokens(batch["input_ids"])
        mask = nn.functional.pad(batch["attention_mask"], (3, 0), value=1)
        states = model.get_encoder()(
            inputs_embeds=torch.cat([rows.expand(3, -1, -1), embedded], 1), attention_mask=mask
        )
        wanted = model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=DECODER).logits
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"repetition_penalty": 1.7}, {"cache_implementation": "static"},
     {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["greedy", "beams", "penalty", "static", "uncached", "both beams"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_reads_them_as_words(name: str, options: dict[str, Any]) -> None:
    model = MODELS[name]()
    inlay.attach(model, METHOD)
    batch = padded([6, 2, 5])
    with inlay.use(model):
        wanted = model.generate(**with_words(batch), **(GREEDY | options))
        plain = model.generate(**batch, **(GREEDY | options))
    assert torch.equal(model.generate(**batch, **(GREEDY | options)), wanted)
    assert not torch.equal(plain, wanted)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_prompts_of_different_length_in_one_batch(name: str) -> None:
    model = MODELS[name]()
    inlay.attach(model, PromptTuning(length=2), "short", seed=0, activate=False)
    inlay.attach(model, KitLowRank(rank=2) + PromptTuning(length=5), "long", seed=1, activate=False)
    wake(model)
    batch, names = padded([7, 3, 5]), ["long", None, "short"]
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}]
    unmasked = {"input_ids": padded([5, 5, 5])["input_ids"]}
    with inlay.route(model, names):
        together, bare = logits(model, batch), logits(model, unmasked)
        written = [model.generate(**batch, **(GREEDY | way)) for way in ways]
    for row, stack in enumerate(names):
        with inlay.route(model, [stack]) if stack else inlay.use(model):
            own = {k: v[row : row + 1, : int(batch["attention_mask"][row].sum())] for k, v in batch.items()}
            alone = model(**own, decoder_input_ids=DECODER[row : row + 1]).logits
            torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)
            one = model(unmasked["input_ids"][row : row + 1], decoder_input_ids=DECODER[row : row + 1]).logits
            torch.testing.assert_close(bare[row : row + 1], one, **CLOSE)
            for way, found in zip(ways, written, strict=True):
                assert torch.equal(found[row], model.generate(**own, **(GREEDY | way))[0])


def test_labels_and_gradients() -> None:
    model = MODELS["t5"]()
    inlay.attach(model, METHOD)
    out = model(**padded([7, 3, 5]), labels=DECODER)
    assert out.logits.shape == (3, 5, VOCABULARY)
    out.loss.backward()
    inlay.check_training(model)
    assert bool((rows_of(model).grad.abs().sum(1) > 0).all())


def test_what_a_model_tells_of_itself() -> None:
    """Lists of states and weights are about the tokens; the encoder's last states hold what is read."""
    model = MODELS["bart"]()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    inlay.attach(model, METHOD)
    batch = padded([6, 4])
    told: dict[str, Any] = {
        "decoder_input_ids": DECODER[:2],
        "output_hidden_states": True,
        "output_attentions": True,
    }
    found = model(**batch, **told)
    with inlay.use(model):
        wanted = model(**with_words(batch), **told)
    for mine, theirs in zip(found.encoder_hidden_states, wanted.encoder_hidden_states, strict=True):
        torch.testing.assert_close(mine[0], theirs[0, 4:], **CLOSE)
    for mine, theirs in zip(found.cross_attentions, wanted.cross_attentions, strict=True):
        torch.testing.assert_close(mine[0], theirs[0, ..., 4:], **CLOSE)
    assert {a.shape[2:] for a in found.encoder_attentions} == {(6, 6)}
    assert {a.shape[2:] for a in found.decoder_attentions} == {(5, 5)}
    assert found.encoder_last_hidden_state.shape == (2, 10, 32)
    again = model(encoder_outputs=(found.encoder_last_hidden_state,), attention_mask=batch["attention_mask"],
                  decoder_input_ids=DECODER[:2])  # fmt: skip
    torch.testing.assert_close(again.logits, found.logits, **CLOSE)


def test_an_encoder_run_without_rows_is_read_without_them() -> None:
    model = MODELS["bart"]()
    inlay.attach(model, METHOD)
    batch = padded([6, 4])
    with inlay.use(model):
        states = model.get_encoder()(**batch)
        wanted = model(encoder_outputs=states, **batch, decoder_input_ids=DECODER[:2]).logits
    found = model(encoder_outputs=states, **batch, decoder_input_ids=DECODER[:2]).logits
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_classifier_pools_the_decoders_last_token() -> None:
    model = seeded(lambda: BartForSequenceClassification(BartConfig(**SIZES, num_labels=3)))
    inlay.attach(model, METHOD)
    ids = torch.tensor([[9, 30, 17, 8, 2], [40, 3, 12, 21, 2]])
    joined = torch.cat([WORDS.expand(2, -1), ids], 1)
    found = model(ids).logits
    with inlay.use(model):
        states = model.model.encoder(joined)
        shifted = torch.cat([torch.full((2, 1), 2), ids[:, :-1]], 1)
        last = model.model.decoder(shifted, encoder_hidden_states=states[0])[0][:, -1]
        wanted, plain = model.classification_head(last), model(ids).logits
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (found - plain).abs().max() > 1e-2


def test_speech() -> None:
    """Whisper's encoder reads sound: rows enter at its first block, and its decoder reads them."""
    sizes = {k: v for k, v in SIZES.items() if k not in ("max_position_embeddings", "decoder_start_token_id")}
    config = WhisperConfig(**sizes, decoder_start_token_id=2, num_mel_bins=8, max_source_positions=12,
                           max_target_positions=32)  # fmt: skip
    model = seeded(lambda: WhisperForConditionalGeneration(config))
    sound = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))
    inlay.attach(model, PromptTuning(length=3), seed=0)
    with torch.no_grad():
        found = model(input_features=sound, decoder_input_ids=DECODER[:2]).logits
    with inlay.use(model), torch.no_grad():
        encoder = model.model.encoder
        h = nn.functional.gelu(encoder.conv2(nn.functional.gelu(encoder.conv1(sound)))).transpose(1, 2)
        h = torch.cat([rows_of(model).expand(2, -1, -1), h + encoder.embed_positions.weight], 1)
        for block in encoder.layers:
            h = block(h, None)
        states = (encoder.layer_norm(h),)
        wanted = model(encoder_outputs=states, decoder_input_ids=DECODER[:2]).logits
        plain = model(input_features=sound, decoder_input_ids=DECODER[:2]).logits
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (found - plain).abs().max() > 1e-2


def test_a_decoder_that_takes_no_mask_cannot_tell_prompts_apart() -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
    config = WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=12, max_target_positions=32)
    model = seeded(lambda: WhisperForConditionalGeneration(config))
    for length in (2, 3):
        inlay.attach(model, PromptTuning(length=length), str(length), activate=False)
    refused = pytest.raises(StateError, match="prompts of different length cannot share a batch here")
    with refused as error, inlay.route(model, ["2", "3"]):
        model(input_features=torch.randn(2, 8, 24), decoder_input_ids=DECODER[:2])
    assert "the WhisperDecoder that reads model.encoder.sequence takes no mask" in str(error.value)
