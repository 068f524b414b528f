"""Virtual tokens in encoders: rows among the tokens, that nothing behind the blocks sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hard_prompts import CLOSE, SMALL, WORDS, lively, padded, rows_of, seeded, wake, with_words
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    EuroBertConfig,
    EuroBertModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

import inlay
from inlay.testing.effects import output
from inlay.testing.neighbours import KitLowRank
from inlay_prompt import PromptTuning

VISION = {k: v for k, v in SMALL.items() if not k.endswith(("_token_id", "size")) and "position" not in k} | {
    "hidden_size": 32, "intermediate_size": 48, "image_size": 16, "patch_size": 4,
}  # fmt: skip
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64, "pad_token_id": 0,
          "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
TEXT: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SMALL)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**DISTIL)),
    "electra": lambda: ElectraModel(ElectraConfig(**SMALL, embedding_size=16)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2)),
    "eurobert": lambda: EuroBertModel(EuroBertConfig(**SMALL, num_key_value_heads=2, mask_token_id=3)),
    "clip text": lambda: CLIPTextModel(CLIPTextConfig(**SMALL)),
    "t5 encoder": lambda: T5EncoderModel(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0)
    ),
}
METHOD = PromptTuning(length=4, tokens=tuple(WORDS.tolist()))


def hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).last_hidden_state
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TEXT)
def test_rows_that_are_words_act_as_words(name: str, attention: str) -> None:
    """Positions, types, layer norms, scales and relative distances are those of a real prompt."""
    model = seeded(TEXT[name])
    model.set_attn_implementation(attention)  # type: ignore[operator]
    batch = padded([7, 3, 5])
    wanted, plain = hidden(model, with_words(batch))[:, 4:], hidden(model, batch)
    inlay.attach(model, METHOD)
    found, real = hidden(model, batch), batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], **CLOSE)
    assert (found - plain)[real].abs().max() > 1e-2
    whole = {"input_ids": batch["input_ids"][:1]}
    torch.testing.assert_close(hidden(model, whole), found[:1], **CLOSE)


def test_roberta_counts_positions_without_padding() -> None:
    """Its positions come from the ids: rows in front of tokens padded on the left count from the first."""
    model = seeded(TEXT["roberta"])
    left, right = padded([7, 3], left=True), padded([7, 3])
    inlay.attach(model, METHOD)
    torch.testing.assert_close(hidden(model, left)[1, 4:], hidden(model, right)[1, :3], **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert_as_the_catalogue_says(attention: str) -> None:
    """X = [P; E] through the embeddings, the blocks and, cut, the pooler: written out in plain torch."""
    model = lively("bert", attn_implementation=attention)
    inlay.attach(model, PromptTuning(length=3, init="uniform"), seed=1)
    batch, rows = padded([7, 3, 5]), rows_of(model).detach()
    batch["token_type_ids"] = (batch["input_ids"] % 2) * batch["attention_mask"]
    found = output(model, batch)
    embeddings, encoder = model.bert.embeddings, model.bert.encoder
    with inlay.use(model), torch.no_grad():
        words = torch.cat([rows.expand(3, -1, -1), embeddings.word_embeddings(batch["input_ids"])], 1)
        types = nn.functional.pad(batch["token_type_ids"], (3, 0))
        total = (
            words + embeddings.position_embeddings(torch.arange(10)) + embeddings.token_type_embeddings(types)
        )
        seen = nn.functional.pad(batch["attention_mask"], (3, 0), value=1).bool()[:, None, None]
        mask = seen if attention == "sdpa" else torch.zeros(seen.shape).masked_fill(~seen, -1e38)
        last = encoder(embeddings.LayerNorm(total), attention_mask=mask)[0]
        wanted = model.classifier(model.bert.pooler(last[:, 3:]))
        virtual = model.classifier(model.bert.pooler(last))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (found - virtual).abs().max() > 1e-3  # the pooler reads no row


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForTokenClassification])
def test_labels_and_logits_keep_their_rows(kind: Any) -> None:
    model = seeded(lambda: kind(BertConfig(**SMALL, num_labels=3)))
    inlay.attach(model, METHOD)
    batch = padded([5, 5])
    labels = batch["input_ids"] % 3
    out = model(**batch, labels=labels)
    assert out.logits.shape[:2] == (2, 5)
    expected = nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    inlay.check_training(model)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", ["bert", "distilbert", "clip text", "t5 encoder"])
def test_what_a_model_tells_of_itself_is_about_the_tokens(name: str, early: bool) -> None:
    model = seeded(TEXT[name])
    model.set_attn_implementation("eager")  # type: ignore[operator]
    batch = padded([6, 4])
    told: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    if early:  # its hooks are then in front of ours
        model(**batch, **told)
    wanted = model(**with_words(batch), **told)
    inlay.attach(model, METHOD)
    found, listed = model(**batch, **told), model(**batch, **told, return_dict=False)
    real = batch["attention_mask"].bool()
    for mine, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(mine[real], theirs[:, 4:][real], **CLOSE)
    for mine, theirs in zip(found.attentions, wanted.attentions, strict=True):
        torch.testing.assert_close(mine[0], theirs[0, :, 4:, 4:], **CLOSE)
    assert {t.shape[1] for t in next(v for v in listed if isinstance(v, tuple))} == {6}


# -- patches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_visual_prompts(name: str, attention: str) -> None:
    """Rows enter at the first block, among embedded patches; the class token is what pools."""
    if name == "vit":
        model = seeded(lambda: ViTModel(ViTConfig(**VISION)))
        blocks, last = model.layers, model.layernorm
    else:
        model = seeded(lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)))
        blocks, last = model.encoder.layers, model.post_layernorm
    model.set_attn_implementation(attention)  # type: ignore[operator]
    inlay.attach(model, PromptTuning(length=3), seed=0)
    rows = rows_of(model).detach()
    assert 0.4 < rows.abs().max() <= 0.5
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(pixel_values=images)
    with inlay.use(model), torch.no_grad():
        h = model.embeddings(images)
        h = model.pre_layrnorm(h) if name == "clip" else h
        h = torch.cat([h[:, :1], rows.expand(2, -1, -1), h[:, 1:]], 1)  # where visual prompt tuning puts them
        for block in blocks:
            h = block(h, None)
        plain = model(pixel_values=images).pooler_output
    first = last(h[:, 0])
    wanted = model.pooler(last(h)) if name == "vit" else first
    torch.testing.assert_close(found.pooler_output, wanted, **CLOSE)
    assert found.last_hidden_state.shape == (2, 17, 32)
    assert (found.pooler_output - plain).abs().max() > 1e-2


def test_each_tower_of_clip_can_have_a_prompt() -> None:
    model = seeded(lambda: CLIPModel(CLIPConfig(text_config=SMALL, vision_config=VISION, projection_dim=16)))
    sites = inlay.plan(model, PromptTuning(length=2)).parts[0].sites
    assert [s.name for s in sites] == ["text_model.encoder.sequence"]
    batch = {**padded([6, 4]), "pixel_values": torch.randn(2, 3, 16, 16)}
    before = model(**batch)
    for tower, changed in (("text_model", "text_embeds"), ("vision_model", "image_embeds")):
        inlay.attach(model, PromptTuning(length=2, targets=[tower]))
        after = model(**batch)
        for name in ("text_embeds", "image_embeds"):
            assert torch.equal(after[name], before[name]) == (name != changed)
        inlay.detach(model)
    inlay.attach(model, PromptTuning(length=2, targets=["text_model", "vision_model"]))
    after = model(**batch)
    assert not torch.equal(after.text_embeds, before.text_embeds)
    assert not torch.equal(after.image_embeds, before.image_embeds)


# -- stacks and routes -----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TEXT)
def test_prompts_of_different_length_in_one_batch(name: str, attention: str) -> None:
    model = seeded(TEXT[name])
    model.set_attn_implementation(attention)  # type: ignore[operator]
    inlay.attach(model, PromptTuning(length=2), "short", seed=0, activate=False)
    inlay.attach(model, KitLowRank(rank=2) + PromptTuning(length=5), "long", seed=1, activate=False)
    wake(model)
    batch, names = padded([7, 3, 5, 6]), ["long", None, "short", "long"]
    with inlay.route(model, names):
        together = hidden(model, batch)
    for row, stack in enumerate(names):
        own = {k: v[row : row + 1] for k, v in batch.items()}
        with inlay.route(model, [stack]) if stack else inlay.use(model):
            alone = hidden(model, own)
        real = own["attention_mask"].bool()
        torch.testing.assert_close(together[row : row + 1][real], alone[real], **CLOSE)


def test_two_prompts_stand_in_stack_order() -> None:
    model, twin = lively("bert"), lively("bert")
    inlay.attach(model, PromptTuning(length=2).named("a") + PromptTuning(length=3).named("b"), "fr", seed=0)
    inlay.attach(twin, PromptTuning(length=5), seed=0)
    rows_of(twin).data = torch.cat([rows_of(model, "fr/a").data, rows_of(model, "fr/b").data])
    batch = padded([7, 3])
    assert torch.equal(output(model, batch), output(twin, batch))
