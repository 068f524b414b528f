"""Virtual tokens beside methods of other packages, and what of a model they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    BltConfig,
    BltForCausalLM,
    CTRLConfig,
    CTRLModel,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    GPT2Config,
    GPT2Model,
    JambaConfig,
    JambaForCausalLM,
    LayoutLMConfig,
    LayoutLMModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    M2M100Config,
    M2M100Model,
    Ministral3Config,
    Ministral3ForCausalLM,
    MobileBertConfig,
    MobileBertModel,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
)

import inlay
from inlay.authoring import At, Init, Method, OutputDelta, Site, register
from inlay.errors import StateError, TargetError
from inlay.registry import registry
from inlay.stack import need_state
from inlay.testing.effects import output
from inlay.testing.models import VOCABULARY, batch_for, build
from inlay_lora import LoRA
from inlay_prefix import PrefixTuning
from inlay_prompt import PromptTuning, PTuning


def lively(family: str) -> nn.Module:
    return build(family, **({} if family == "t5" else {"initializer_range": 0.2}))


@pytest.mark.parametrize("family", ["bert", "vit", "t5", "gpt2", "llama"])
def test_stacked_with_lora_and_a_prefix(family: str) -> None:
    """In a stack the rows, too, meet the LoRA and see the prefix: alone each part changes something."""
    model = lively(family)
    batch = batch_for(model, labels=True)
    stack = LoRA(rank=2) + PrefixTuning(length=3, reparam=False) + PromptTuning(length=4)
    inlay.attach(model, stack, "fr", seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("up") and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    whole = output(model, batch)
    for part in ("lora", "prefix_tuning", "prompt_tuning"):
        others = [f"fr/{p}" for p in ("lora", "prefix_tuning", "prompt_tuning") if p != part]
        with inlay.use(model, *others):
            assert (output(model, batch) - whole).abs().max() > 1e-4, part
    model(**batch).loss.backward()
    inlay.check_training(model)


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_dropping_out_and_learning(family: str) -> None:
    """Thirty steps at the method's own rate lower the loss, the base's every bit as it was."""
    for method in (PromptTuning(length=8), PTuning(length=8, encoder="mlp")):
        model = lively(family)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        inlay.attach(model, method, seed=0)
        batch = batch_for(model, rows=8, labels=True)
        optimizer = torch.optim.AdamW(inlay.parameter_groups(model))
        losses = []
        model.train()
        for _ in range(30):
            optimizer.zero_grad()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.97 * losses[0]
        inlay.detach(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_language_model_that_reads_images() -> None:
    """By default the text gets the prompt; the vision tower has one by name, and keeps its own tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={**sizes, "model_type": "llama", "vocab_size": VOCABULARY, "pad_token_id": 0},
        vision_config={**sizes, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
        image_token_index=3,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 3, 3, 3, 3, 9, 8]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    plain = output(model, batch)
    for targets, name in (
        (None, "model.language_model.sequence"),
        (["vision_tower"], "vision_tower.encoder"),
    ):
        plan = inlay.attach(model, PromptTuning(length=3, targets=targets), seed=0)
        assert [name in site.name for site in plan.parts[0].sites] == [True]
        found = output(model, batch)
        assert found.shape == plain.shape
        assert not torch.equal(found, plain)
        inlay.detach(model)
        assert torch.equal(output(model, batch), plain)


class Watched(OutputDelta):
    """Notes which tokens it is told are real."""

    def __init__(self, init: Init, seen: list[torch.Tensor | None]) -> None:
        super().__init__()
        self.zero, self.seen = init.zeros(1), seen

    def forward(self, x: torch.Tensor, y: torch.Tensor, at: At) -> torch.Tensor:
        self.seen.append(at.real(x))
        return y * self.zero


@dataclass(frozen=True)
class Watch(Method):
    """Watches the first layers' queries."""

    id: ClassVar[str] = "watch"
    default_targets: ClassVar[tuple[str, ...]] = ("query",)
    reads_call: ClassVar[bool] = True
    seen: ClassVar[list[torch.Tensor | None]] = []

    def delta(self, site: Site, init: Init) -> Watched:
        return Watched(init, self.seen)


def test_what_mixes_tokens_is_told_which_rows_are_real() -> None:
    """Virtual rows count as tokens; in front of a shorter prompt of the batch there is padding."""
    register(Watch)
    try:
        model = build("bert")
        inlay.attach(model, Watch(layers=[0]) + PromptTuning(length=1), "short", activate=False)
        inlay.attach(model, Watch(layers=[0]) + PromptTuning(length=3), "long", activate=False)
    finally:
        registry.forget(Watch)
    batch = batch_for(model, rows=2, length=4)
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with inlay.use(model, "long"):
        output(model, batch)
    with inlay.route(model, ["short", "long"]):
        output(model, batch)
    found = [seen.int().tolist() for seen in Watch.seen if seen is not None]
    assert found == [
        [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]],
        [[0, 0, 1, 1, 1, 1, 1]],
        [[1, 1, 1, 1, 1, 0, 0]],
    ]


# -- what they do not fit --------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "vocab_size": VOCABULARY}  # fmt: skip
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": VOCABULARY}
SCALED = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
          "original_max_position_embeddings": 8}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "albert": (lambda: AlbertModel(AlbertConfig(**SMALL, embedding_size=16)), "its 1 blocks run 2 times"),
    "bart": (lambda: BartForCausalLM(BartConfig(**BART, is_decoder=True)), "its blocks also read an encoder"),
    "bert": (lambda: BertLMHeadModel(BertConfig(**SMALL)), "its attention does not say it is causal"),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
              "does not go through transformers' attention interface"),
    "falcon": (lambda: FalconH1ForCausalLM(FalconH1Config(**SMALL)), "more than attention"),
    "m2m": (lambda: M2M100Model(M2M100Config(**BART)), r"skips blocks at random \(layerdrop=0.05\)"),
    "ministral": (lambda: Ministral3ForCausalLM(Ministral3Config(**SMALL, rope_parameters=SCALED)),
                  "scales queries by their absolute position"),
    "mobilebert": (lambda: MobileBertModel(MobileBertConfig(**SMALL)), "mix neighbouring tokens"),
    "dinov3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(num_hidden_layers=2)), "more than a position"),
    "closed": (lambda: Closed(GPT2Config(**GPT)), r"it takes no embedded tokens \(inputs_embeds\)"),
    "no blocks": (lambda: nn.Sequential(nn.Linear(4, 4)), "no repeated blocks with attention were found"),
    "no model": (lambda: build("llama").model.layers, "the blocks: no transformers model is around them"),
    "blt": (lambda: BltForCausalLM(BltConfig()), "its blocks come in stages"),
    "ctrl": (lambda: CTRLModel(CTRLConfig(**GPT)), "neither rotary nor one table's"),
    "layoutlm": (lambda: LayoutLMModel(LayoutLMConfig(**SMALL)), "it has 5 tables of positions"),
    "jamba": (lambda: JambaForCausalLM(JambaConfig(num_hidden_layers=8)), "1 of its 8 blocks have attention"),
    "t5gemma": (lambda: T5Gemma2ForConditionalGeneration(T5Gemma2Config()), "a part of the encoder, not all"),
}  # fmt: skip


class Closed(GPT2Model):
    """Someone's own model, which takes ids alone."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_they_do_not_fit_is_refused_with_the_reason(name: str) -> None:
    make, reason = UNFIT[name]
    with torch.device("meta"):
        model = make()
    with pytest.raises(TargetError, match=reason) as refused:
        inlay.plan(model, PromptTuning())
    assert f"virtual tokens cannot enter this {type(model).__name__}" in str(refused.value)


def test_attention_that_calls_twice_is_refused() -> None:
    model = DiffLlamaForCausalLM(DiffLlamaConfig(**SMALL)).eval()
    inlay.attach(model, PromptTuning(length=2))
    with pytest.raises(StateError, match="virtual tokens cannot stand in front of this attention") as refused:
        model(torch.tensor([[3, 4]]))
    assert "model.layers.0.self_attn calls the attention function more than once" in str(refused.value)


def test_blocks_that_read_packed_tokens_or_a_cache_are_refused() -> None:
    model = build("bert")
    inlay.attach(model, PromptTuning(length=2))
    block, state = model.bert.encoder.layer[0], need_state(model)
    state.slot.call = state.default_call().begin(model, (), {})
    try:
        state.slot.call.prepare()
        with pytest.raises(StateError, match="virtual tokens cannot enter here") as refused:
            block(torch.zeros(5, 32))
        assert "hidden states of shape (5, 32)" in str(refused.value)
        with pytest.raises(StateError, match="virtual tokens cannot enter here") as refused:
            block(torch.zeros(1, 5, 32), past_key_values=DynamicCache())
        assert "a cache of keys and values" in str(refused.value)
    finally:
        state.slot.call = None


def test_a_change_of_what_the_table_of_positions_gives_is_refused() -> None:
    model = build("gpt2")
    before = dict(model.named_modules())
    with pytest.raises(inlay.InlayError, match="virtual tokens move the table of positions") as refused:
        inlay.attach(model, PromptTuning(length=3) + LoRA(targets=["wpe"]))
    assert "a delta on the output of transformer.wpe" in str(refused.value)
    assert dict(model.named_modules()) == before
