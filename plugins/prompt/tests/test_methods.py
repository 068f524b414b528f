"""What the two methods own: counts of the papers, starting values, networks that are let go, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hard_prompts import CLOSE, WORDS, lively, padded, rows_of
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import inlay
from inlay.errors import ConfigError, StateError
from inlay.stack import need_state
from inlay.testing.effects import output
from inlay.testing.models import batch_for, build
from inlay_prompt import PromptTuning, PTuning

FORMS = {"lstm": PTuning(length=3), "mlp": PTuning(length=3, encoder="mlp", hidden=7)}


def delta_of(model: nn.Module) -> Any:
    return need_state(model).find("default")[0].adapter.placed[0][1]


def test_counts_of_the_papers() -> None:
    with torch.device("meta"):
        xxl = T5ForConditionalGeneration(T5Config(d_model=4096, num_layers=1, num_heads=4, d_ff=8))
        bert = BertModel(BertConfig(num_hidden_layers=1))
    assert inlay.plan(xxl, PromptTuning(length=5)).parameters == 20_480
    assert inlay.plan(bert, PTuning(length=9)).parameters == 8_278_272
    assert inlay.plan(bert, PTuning(length=9, encoder="mlp")).parameters == 9 * 768 + 3 * (768**2 + 768)


# -- prompt tuning ---------------------------------------------------------------------------------


def test_starts_from_different_words_of_the_vocabulary() -> None:
    for family in ("llama", "gpt2", "bert", "t5"):
        model = build(family)
        inlay.attach(model, PromptTuning(length=4), seed=0)
        table = model.get_input_embeddings().weight
        where = [(table == row).all(1).nonzero().flatten().tolist() for row in rows_of(model)]
        assert all(len(found) == 1 for found in where)
        assert len({found[0] for found in where}) == 4
    inlay.attach(model, PromptTuning(length=200), "long", seed=0)
    assert len(rows_of(model, "long")) == 200


def test_starts_from_what_the_embedding_gives_not_from_its_table() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                              num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    inlay.attach(model, PromptTuning(length=6, tokens=WORDS.tolist()))
    wanted = model.model.embed_tokens.weight[torch.cat([WORDS, WORDS[:2]])] * 32**0.5
    torch.testing.assert_close(rows_of(model), wanted, rtol=1e-2, atol=1e-2)


def test_starts_at_random() -> None:
    model = build("llama")
    inlay.attach(model, PromptTuning(length=50, init="uniform"), seed=0)
    rows = rows_of(model)
    assert 0.45 < rows.abs().max() <= 0.5
    assert abs(rows.mean()) < 0.05


def test_a_token_the_model_does_not_have() -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="token 64; the vocabulary has 64"):
        inlay.attach(model, PromptTuning(length=2, tokens=(5, 64)))
    with pytest.raises(ConfigError, match="tokens=-1"):
        PromptTuning(tokens=(-1,))


def test_patches_have_no_vocabulary() -> None:
    for method in (PromptTuning(init="vocabulary"), PromptTuning(tokens=(3,))):
        with pytest.raises(ConfigError, match=r"vit\.sequence reads patches or sound"):
            inlay.attach(build("vit"), method)


# -- P-tuning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_what_the_paper_writes(form: str) -> None:
    """Recomputed by torch's own modules."""
    model = build("llama")
    inlay.attach(model, FORMS[form], seed=0)
    delta = delta_of(model)
    x, encoder = delta.table.detach(), delta.encoder
    assert x.shape == (3, 32)
    if form == "lstm":
        lstm = nn.LSTM(32, 16, num_layers=2, bidirectional=True)
        for own, other in zip(lstm.parameters(), encoder.weights, strict=True):
            own.data = other.data
        x, encoder = lstm(x)[0], encoder.mlp
    *layers, last = (m for m in encoder if isinstance(m, nn.Linear))
    for layer in layers:
        x = layer(x).relu()
    torch.testing.assert_close(delta.made(), last(x), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_a_prompt_of_the_rows_it_makes(form: str, family: str) -> None:
    model = lively(family)
    inlay.attach(model, FORMS[form], "made", seed=0)
    inlay.attach(model, PromptTuning(length=3, init="uniform"), "plain", seed=0)
    encoded = need_state(model).find("made")[0].adapter.placed[0][1]
    with torch.no_grad():  # torch's LSTM rounds otherwise where it keeps a graph
        rows_of(model, "plain").data = encoded.made()
    batch = batch_for(model)
    with inlay.use(model, "made"):
        found = output(model, batch)
    with inlay.use(model, "plain"):
        assert torch.equal(found, output(model, batch))


@pytest.mark.parametrize("form", FORMS)
def test_the_network_is_let_go(form: str, tmp_path: Path) -> None:
    """Outputs stay, n·d numbers are left, learn and come back from a file; there is no way back."""
    model = lively("bert")
    inlay.attach(model, FORMS[form], seed=0)
    batch = padded([7, 3])
    before = output(model, batch)
    assert [stage.name for stage in inlay.stages(model, "default")] == ["train"]
    inlay.save(model, tmp_path / "made")
    assert inlay.advance(model, "default") is None
    assert torch.equal(output(model, batch), before)
    with pytest.raises(StateError, match="no stage left"):
        inlay.advance(model, "default")
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [(3, 32)]
    model(**batch, labels=torch.tensor([0, 1])).loss.backward()
    inlay.check_training(model)
    inlay.save(model, tmp_path / "flat")
    for folder in ("made", "flat"):
        fresh = lively("bert")
        inlay.load(fresh, tmp_path / folder)
        assert torch.equal(output(fresh, batch), before)


@pytest.mark.parametrize("method", [PromptTuning(length=2), *FORMS.values()])
def test_says_why_it_cannot_be_merged(method: Any) -> None:
    model = build("llama")
    inlay.attach(model, method)
    with pytest.raises(inlay.CannotMerge, match="virtual tokens are read beside the text"):
        inlay.merge(model)
