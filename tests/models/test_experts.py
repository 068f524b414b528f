"""Mixtures of experts: each expert's matrix is a layer of its own, in every layout transformers knows.

The reference runs the model's own code with changed weights: W + s B A written into the 3-D tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay import InlayError
from inlay.anatomy import Anatomy
from inlay.errors import RoutingError
from inlay.sites import ModuleSite
from inlay.stack import state_of
from inlay.testing.tools import distance, shake

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "num_local_experts": 4,
         "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
NEMOTRON = {**SIZES, "n_routed_experts": 4, "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "layer_types": ["attention", "moe"], "n_group": 1, "topk_group": 1}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gate, then up": ("MixtralConfig", "MixtralForCausalLM", SIZES),
    "gate and up by turns, (in, out), biases": ("GptOssConfig", "GptOssForCausalLM", SIZES),
    "(in, out), biases": ("OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterForTokenClassification", SIZES),
    "no gate": ("NemotronHConfig", "NemotronHForCausalLM", NEMOTRON),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", MODELS)
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def built(name: str) -> nn.Module:
    config, kind, settings = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():  # expert tensors that a class forgets to initialise
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def experts(model: nn.Module) -> list[ModuleSite]:
    return [site for site in Anatomy(model).leaves if site.expert is not None]


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(3, 64, (rows, 7), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result


def written(model: nn.Module) -> None:
    """Put W + s B A in the place of every expert's W, tensor by tensor, by the layout's own description."""
    state = state_of(model)
    assert state is not None
    changes = [(site, delta) for p in state.placed.values() for site, delta in p.adapter.placed]
    copies = [(site, delta.scale * delta.up.detach() @ delta.down.detach()) for site, delta in changes]
    inlay.detach(model)
    for site, change in copies:
        module = site.module
        tensor = getattr(module, site.weight_name).data[site.expert]
        matrix = tensor.T if module.is_transposed else tensor
        half = matrix.shape[0] // 2
        gated = module.has_gate and site.role in ("gate", "up")
        if gated and module.is_concatenated:
            matrix = matrix[:half] if site.role == "gate" else matrix[half:]
        elif gated:
            matrix = matrix[0::2] if site.role == "gate" else matrix[1::2]
        matrix += change


@ALL
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lora_on_every_expert_is_the_model_with_changed_weights(name: str, implementation: str) -> None:
    model = built(name)
    model.set_experts_implementation(implementation)  # type: ignore[operator]
    base = logits(model, tokens())
    inlay.attach(model, "lora(rank=2, alpha=4.0, targets=['experts'])")
    torch.testing.assert_close(logits(model, tokens()), base, rtol=1e-4, atol=1e-5)
    shake(model)
    adapted = logits(model, tokens())
    assert distance(adapted, base) > 1e-2
    written(model)
    torch.testing.assert_close(adapted, logits(model, tokens()), rtol=1e-4, atol=1e-4)


@ALL
@pytest.mark.parametrize("method", ["lora(rank=2, {})", "dora(rank=2, {})", "ia3({})", "trained({})"])
def test_any_method_for_layers_learns_merges_and_leaves(name: str, method: str) -> None:
    model = built(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base = logits(model, tokens())
    inlay.attach(model, method.format("targets=['down']"))
    shake(model)
    adapted = logits(model, tokens())
    assert distance(adapted, base) > 1e-4
    model(input_ids=tokens()).logits.square().mean().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    report = inlay.merge(model)
    assert report.worst < 1e-4
    torch.testing.assert_close(logits(model, tokens()), adapted, rtol=1e-3, atol=1e-3)
    inlay.detach(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(model, tokens()), base, rtol=0, atol=0)


@ALL
def test_rows_of_a_batch_have_their_own_adapters(name: str) -> None:
    model = built(name)
    inlay.attach(model, "lora(rank=2, targets=['experts'])", "one")
    inlay.attach(model, "lora(rank=3, targets=['up'])", "other")
    shake(model)
    names = ["one", None, "other"]
    with inlay.route(model, names):
        routed = logits(model, tokens())
    for row, adapter in enumerate(names):
        with inlay.use(model, *([adapter] if adapter else [])):
            alone = logits(model, tokens())[row]
        torch.testing.assert_close(routed[row], alone, rtol=1e-4, atol=1e-4)


def test_tokens_that_are_not_rows_by_length_are_refused() -> None:
    model: Any = built("gate, then up")
    inlay.attach(model, "lora(rank=2, targets=['experts'])")
    layer = model.model.layers[0].mlp.experts
    state = state_of(model)
    assert state is not None
    with inlay.route(model, ["default", None]):
        state.slot.call.batch = 2
        with pytest.raises(
            RoutingError, match=r"the tokens of model\.layers\.0\.mlp\.experts cannot be told apart"
        ) as caught:
            layer(torch.zeros(5, 32), torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2))
        assert "5 tokens of a batch of 2" in str(caught.value)


@ALL
def test_what_is_saved_comes_back(name: str, tmp_path: Any) -> None:
    model = built(name)
    inlay.attach(model, "lora(rank=2, targets=['experts'])", "fr")
    shake(model)
    adapted = logits(model, tokens())
    inlay.save(model, tmp_path)
    inlay.detach(model)
    inlay.load(model, tmp_path, name="fr")
    assert torch.equal(logits(model, tokens()), adapted)


def test_targets_name_the_layer_its_tensors_or_roles() -> None:
    model = built("gate, then up")
    targets = ("experts", "experts.down_proj", "*.gate_up_proj", "model.layers.1.mlp.experts", "up")
    assert {t: inlay.plan(model, f"lora(targets=[{t!r}])").parts[0].kinds for t in targets} == {
        "experts": {"gate": 8, "up": 8, "down": 8},
        "experts.down_proj": {"down": 8},
        "*.gate_up_proj": {"gate": 8, "up": 8},
        "model.layers.1.mlp.experts": {"gate": 4, "up": 4, "down": 4},
        "up": {"up": 8},
    }


def test_a_sublayer_adapter_sees_all_experts_together() -> None:
    model: Any = built("gate, then up")
    sites = {site.name: site.module for site in Anatomy(model).sublayers if site.role == "ffn"}
    assert list(sites) == ["model.layers.0.ffn", "model.layers.1.ffn"]
    assert sites["model.layers.0.ffn"] is model.model.layers[0].mlp


def test_a_bias_where_experts_have_none_runs_but_does_not_merge() -> None:
    model = built("gate, then up")
    inlay.attach(model, "ssf(targets=['down'])")
    shake(model)
    logits(model, tokens())
    with pytest.raises(InlayError, match="a bias has no place here"):
        inlay.merge(model)


def test_entries_chosen_by_fisher_information_are_of_each_expert() -> None:
    model = built("gate, then up")
    batch = {"input_ids": tokens(), "labels": tokens()}
    inlay.attach(model, "fishmask(density=0.01, targets=['experts'])", data=[batch])
    shake(model)
    with inlay.use(model):
        base = logits(model, tokens())
    adapted = logits(model, tokens())
    assert distance(adapted, base) > 1e-5
    inlay.merge(model, undo=False)
    torch.testing.assert_close(logits(model, tokens()), adapted, rtol=1e-4, atol=1e-4)
