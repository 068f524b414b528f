"""Prompt tuning and P-tuning beside huggingface/peft: the same values in both, the same output.

Where peft differs by choice it is not compared: the loss on virtual rows, BERT's pooler on one of
them, positions under padding on the left, T5's second, unused prompt.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import inlay
from inlay.stack import need_state
from inlay.testing.models import batch_for, build
from inlay_prompt import PromptTuning, PTuning

peft = pytest.importorskip("peft")
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION"}
SETTINGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "prompt": (PromptTuning(length=4), peft.PromptTuningConfig, {}),
    "mlp": (
        PTuning(length=4, encoder="mlp", hidden=24),
        peft.PromptEncoderConfig,
        {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 24},
    ),
    "lstm": (
        PTuning(length=4, hidden=24),
        peft.PromptEncoderConfig,
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 24, "encoder_num_layers": 2},
    ),
}


def base(family: str) -> nn.Module:
    if family != "bert":
        return build(family)
    sizes = build("bert").config.to_dict() | {"initializer_range": 0.2}
    torch.manual_seed(0)
    return BertModel(BertConfig(**sizes)).eval()


def theirs(model: nn.Module, family: str, kind: Any, settings: dict[str, Any]) -> nn.Module:
    config = kind(task_type=TASKS[family], num_virtual_tokens=4, num_transformer_submodules=1, **settings)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    nn.init.normal_(wrapped.prompt_encoder["default"].embedding.weight, std=0.5)
    return wrapped.eval()


def carry_over(encoder: nn.Module, delta: Any) -> None:
    """Give our delta the values of peft's encoder."""
    with torch.no_grad():
        (delta.rows if delta.rows is not None else delta.table).copy_(encoder.embedding.weight)
        if hasattr(encoder, "lstm_head"):
            pairs = zip(delta.encoder.weights, encoder.lstm_head.parameters(), strict=True)
            for mine, other in pairs:
                mine.copy_(other)
        if hasattr(encoder, "mlp_head"):
            mlp = delta.encoder.mlp if hasattr(encoder, "lstm_head") else delta.encoder
            mlp.load_state_dict(encoder.mlp_head.state_dict())


def seen(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    found: Tensor = out.last_hidden_state if "last_hidden_state" in out else out.logits
    return found


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", TASKS)
def test_same_values_same_output_and_gradient(family: str, name: str) -> None:
    method, kind, settings = SETTINGS[name]
    model = base(family)
    other = theirs(model, family, kind, settings)
    inlay.attach(model, method)
    delta = need_state(model).find("default")[0].adapter.placed[0][1]
    carry_over(other.prompt_encoder["default"], delta)
    batch = batch_for(model)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 5:] = 0
    real = batch["attention_mask"].bool()
    mine, wanted = seen(model, batch), seen(other, batch)
    if family == "t5":
        real = torch.ones(wanted.shape[:2], dtype=torch.bool)
    mine, wanted = mine[real], wanted[:, wanted.shape[1] - mine.shape[1] :][real]
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
    with inlay.use(model), torch.no_grad():
        assert (seen(model, batch)[real] - wanted).abs().max() > 1e-2
    for found in (mine, wanted):
        found.square().sum().backward()
    ours = (delta.rows if delta.rows is not None else delta.table).grad
    torch.testing.assert_close(
        ours, other.prompt_encoder["default"].embedding.weight.grad, rtol=1e-4, atol=1e-4
    )
    trainable = sum(p.numel() for p in other.parameters() if p.requires_grad)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
