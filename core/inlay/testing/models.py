"""Tiny real transformers models, built from configurations: seconds to run, nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCABULARY = 64


def llama(**changes: Any) -> nn.Module:
    """A decoder with rotary positions and grouped-query attention (also the shape of Mistral and Qwen)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**_decoder(), "num_key_value_heads": 2, **changes}))


def qwen(**changes: Any) -> nn.Module:
    """A decoder with biases on query, key and value, and tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(**{**_decoder(), "num_key_value_heads": 2, "tie_word_embeddings": True, **changes})
    )


def mistral(**changes: Any) -> nn.Module:
    """A decoder with a sliding window shorter than the test sequences."""
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(**{**_decoder(), "num_key_value_heads": 2, "sliding_window": 4, **changes})
    )


def gpt2(**changes: Any) -> nn.Module:
    """A decoder with learned positions, Conv1D layers, fused projections and a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes}))


def bert(**changes: Any) -> nn.Module:
    """A post-norm encoder with a classification head."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**{**_encoder(), **changes}))


def roberta(**changes: Any) -> nn.Module:
    """A post-norm encoder whose head has two layers."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**{**_encoder(), **changes}))


def t5(**changes: Any) -> nn.Module:
    """An encoder-decoder with relative positions and a gated feed-forward."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
             "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
             "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # fmt: skip
    return T5ForConditionalGeneration(T5Config(**{**sizes, **changes}))


def vit(**changes: Any) -> nn.Module:
    """A vision encoder with a classification head."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
             "image_size": 16, "patch_size": 4, "num_labels": 3}  # fmt: skip
    return ViTForImageClassification(ViTConfig(**{**sizes, **changes}))


def mixtral(**changes: Any) -> nn.Module:
    """A decoder whose feed-forwards are mixtures of experts, all matrices in 3-D parameters."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**{**_decoder(), **_experts(), **changes}))


def gpt_oss(**changes: Any) -> nn.Module:
    """A mixture of experts stored (in, out), gate and up by turns, with biases; sinks in its attention."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**{**_decoder(), **_experts(), "head_dim": 8, **changes}))


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "llama": llama, "qwen": qwen, "gpt2": gpt2, "bert": bert, "roberta": roberta, "t5": t5, "vit": vit,
}  # fmt: skip
EXPERTS: dict[str, Callable[..., nn.Module]] = {"mixtral": mixtral, "gpt_oss": gpt_oss}


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """Return a seeded tiny model in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {**FAMILIES, **EXPERTS}[family](**changes).to(dtype).eval()


def batch_for(
    model: nn.Module, *, rows: int = 3, length: int = 7, seed: int = 0, labels: bool = False
) -> dict[str, Any]:
    """Return a batch the model takes: no padding, tokens that are not special."""
    generator = torch.Generator().manual_seed(seed)
    kind = type(model).__name__
    if kind.startswith("ViT"):
        dtype = next(model.parameters()).dtype
        batch: dict[str, Any] = {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator).to(dtype)}
    else:
        batch = {"input_ids": torch.randint(3, VOCABULARY - 1, (rows, length), generator=generator)}
    if kind.startswith("T5"):
        batch["labels"] = torch.randint(3, VOCABULARY - 1, (rows, length), generator=generator)
    elif labels:
        count = 3 if "Classification" in kind else 0
        batch["labels"] = (
            torch.randint(0, count, (rows,), generator=generator) if count else batch["input_ids"]
        )
    return batch


def _decoder() -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def _experts() -> dict[str, Any]:
    return {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}


def _encoder() -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "max_position_embeddings": 64, "num_labels": 3,
            "pad_token_id": 0}  # fmt: skip
