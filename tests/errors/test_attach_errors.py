"""Models that cannot take an adapter, or can no longer give it back: refused by name, untouched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import BartConfig, BartForConditionalGeneration, GPTJConfig, GPTJForCausalLM

import inlay
from inlay.attention import attention, widened
from inlay.authoring import (
    Adapter,
    AttentionDelta,
    KeyValues,
    Method,
    ModuleSite,
    OutputDelta,
    hookimpl,
    setting,
)
from inlay.authoring.trained import Trained
from inlay.errors import AttachError, ConfigError, InlayError, StateError
from inlay.stack import need_state
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay.weights import read
from inlay_lora import LoRA
from inlay_prefix import PrefixTuning
from inlay_scaling import IA3

QUERY = "model.layers.0.self_attn.q_proj"


def test_a_patched_forward_is_refused() -> None:
    model = build("llama")
    layer = model.get_submodule(QUERY)
    layer.forward = lambda x: x  # type: ignore[assignment]
    match = rf"a module's forward has been replaced on the instance[\s\S]*{QUERY}\.forward is <function"
    with refused(AttachError, match, model=model):
        inlay.attach(model, LoRA())
    with refused(AttachError, match, model=model):
        inlay.attach(model, IA3() + LoRA())
    del layer.forward
    inlay.attach(model, LoRA())


def test_a_patched_root_is_refused() -> None:
    model = build("llama")
    model.forward = model.forward  # type: ignore[method-assign]
    inlay.attach(model, LoRA())  # its own forward, bound to it, is none
    inlay.detach(model)
    model.forward = lambda **batch: None  # type: ignore[method-assign]
    with refused(AttachError, "replaced on the instance", model=model):
        inlay.attach(model, LoRA())


def test_a_site_patched_after_attaching_is_noticed() -> None:
    model = build("llama")
    inlay.attach(model, LoRA(), "fr")
    model.get_submodule(QUERY).forward = lambda x: x  # type: ignore[assignment]
    with refused(AttachError, rf"an adapter's site would be bypassed[\s\S]*{QUERY}", model=model):
        inlay.attach(model, IA3(), "de")


def test_a_module_with_our_attribute_is_refused() -> None:
    model = build("llama")
    model.get_submodule(QUERY).inlay = nn.Linear(2, 2)
    with refused(AttachError, r"a module already has an attribute 'inlay'[\s\S]*rename it", model=model):
        inlay.attach(model, LoRA())


class WrappedLinear(nn.Linear):
    """The shape of peft's layers: a module named so, with a base layer. peft itself is no dependency here."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__(base_layer.in_features, base_layer.out_features)
        self.base_layer = base_layer


WrappedLinear.__module__ = "peft.tuners.lora.layer"


def test_another_librarys_adapter_is_refused() -> None:
    model = nn.Sequential(WrappedLinear(nn.Linear(3, 3)))
    with refused(
        AttachError,
        r"a module is wrapped by another library's adapter[\s\S]*peft: model\.unload",
        model=model,
    ):
        inlay.attach(model, LoRA(rank=2, targets=["0"]))


class Final(nn.Linear):
    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


def test_a_class_that_cannot_be_subclassed_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Final(3, 3))
    match = r"a module's class cannot be subclassed[\s\S]*1 is a Final: .*Final is final"
    with refused(AttachError, match, model=model):
        inlay.attach(model, LoRA(rank=2, targets=["0", "1"]))
    inlay.attach(model, LoRA(rank=2, targets=["0"]))


def test_a_part_of_an_adapted_model_is_refused() -> None:
    model = build("llama")
    inlay.attach(model, LoRA(), "fr")
    match = "this module is part of a model, or holds one, that has adapters of its own"
    for other in (model.model, model.get_submodule(QUERY), nn.Sequential(model)):
        with refused(AttachError, match, model=model):
            inlay.attach(
                other, LoRA(targets=["q_proj"] if other is not model.get_submodule(QUERY) else ["linear"])
            )
        with refused(StateError, "nothing is attached to this model", model=model):
            inlay.detach(other)


def test_a_class_changed_since_is_refused_and_can_be_undone() -> None:
    model = build("llama")
    inlay.attach(model, LoRA(), "fr")
    layer = model.get_submodule(QUERY)
    parametrizations.weight_norm(layer)
    match = rf"a module changed its class after the adapter was attached[\s\S]*{QUERY} is now .*Parametrized"
    with refused(AttachError, match, model=model) as caught:
        inlay.detach(model)
    assert "remove_parametrizations" in caught.error.do
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    inlay.detach(model)


def resize(target: str) -> Callable[[nn.Module], None]:
    def spoil(model: nn.Module) -> None:
        inlay.attach(model, LoRA(targets=[target]), "rows", trainable=False)
        model.resize_token_embeddings(70, mean_resizing=False)  # type: ignore[operator]

    return spoil


@pytest.mark.parametrize("target", ["head", "embedding"])
def test_a_resized_model_takes_no_other_adapter(target: str) -> None:
    model = build("llama")
    resize(target)(model)
    with refused(AttachError, "an adapter attached before has lost its place in the model", model=model):
        inlay.attach(model, LoRA(), "fr")
    inlay.detach(model)
    inlay.attach(model, LoRA(), "fr")


# -- attention -----------------------------------------------------------------------------------


def test_an_architecture_without_the_attention_interface_is_refused() -> None:
    model = GPTJForCausalLM(
        GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32)
    )
    match = r"does not call attention through transformers' attention interface[\s\S]*GPTJAttention"
    with refused(AttachError, match, model=model):
        inlay.attach(model, PrefixTuning(length=2, hidden=4))
    with refused(AttachError, match, model=model):
        inlay.attach(model, LoRA() + PrefixTuning(length=2, hidden=4))
    inlay.attach(model, LoRA())


def test_attention_computed_beside_the_interface_is_refused() -> None:
    model = build("gpt2", reorder_and_upcast_attn=True)
    with refused(AttachError, "computes its product outside the attention interface", model=model):
        inlay.attach(model, PrefixTuning(length=2, hidden=4))


class Fixed(AttentionDelta):
    def __init__(self, site: Any, init: Any) -> None:
        super().__init__()
        self.rows = init.zeros(1, site.kv_heads, 2, site.head_dim)

    def forward(self, at: Any) -> KeyValues:
        return KeyValues(self.rows, self.rows)


@dataclass(frozen=True)
class FixedRows(Method):
    id: ClassVar[str] = "fixed_rows"
    accepts: ClassVar[frozenset[str]] = frozenset({"attention"})
    default_targets: ClassVar[tuple[str, ...]] = ("attention",)

    def delta(self, site: Any, init: Any) -> Fixed:
        return Fixed(site, init)


def test_a_paged_cache_is_refused_where_columns_would_enter_it() -> None:
    model = build("llama")
    inlay.attach(model, FixedRows(), "fr")
    module = model.get_submodule("model.layers.0.self_attn")
    heads = torch.randn(1, 4, 3, 8)
    with refused(
        StateError, "a paged cache would keep an adapter's extra keys and values as tokens", model=model
    ):
        attention(module, heads, heads[:, :2], heads[:, :2], None, cache=SimpleNamespace())
    with inlay.use(model):
        assert attention(module, heads, heads[:, :2], heads[:, :2], None)[0].shape == (1, 3, 4, 8)


def test_a_mask_of_an_unknown_kind_is_refused() -> None:
    heads = torch.randn(1, 4, 8, 8)
    columns = [KeyValues(heads[:, :, :2], heads[:, :, :2])]
    with refused(StateError, r"this kind of attention mask cannot be widened for extra keys[\s\S]*a str"):
        widened(nn.Module(), heads, heads, "causal", columns, {})


class Beside(OutputDelta):
    """Δy = 0 · residual: reads what is added to a sublayer's output."""

    reads: ClassVar[frozenset[str]] = frozenset({"y", "residual"})

    def __init__(self, site: Any, init: Any) -> None:
        super().__init__()
        self.gate = init.zeros(1)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return self.gate * at.residual


@dataclass(frozen=True)
class ReadsResidual(Method):
    id: ClassVar[str] = "reads_residual"
    accepts: ClassVar[frozenset[str]] = frozenset({"sublayer"})
    default_targets: ClassVar[tuple[str, ...]] = ("attention",)

    def delta(self, site: Any, init: Any) -> Beside:
        return Beside(site, init)


def test_a_residual_that_is_not_known_yet_is_refused() -> None:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "vocab_size": 64, "encoder_layers": 1, "decoder_layers": 1}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads)).eval()
    batch = {"input_ids": torch.tensor([[3, 4, 5]])}
    inlay.attach(model, ReadsResidual(), "fr")
    with (
        refused(AttachError, "the residual of a sublayer is not known before its output", model=model),
        torch.no_grad(),
    ):
        model(**batch)
    bert = build("bert")
    inlay.attach(bert, ReadsResidual(), "fr")
    with torch.no_grad():
        bert(**batch)


# -- adapters that compute with others -----------------------------------------------------------


class Scaled(OutputDelta):
    def __init__(self, init: Any, inner: Any) -> None:
        super().__init__()
        self.gate = init.ones(1)
        object.__setattr__(self, "inner", inner)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return self.gate * self.inner(x, y, at)


@dataclass(frozen=True)
class Doubling(Method):
    """Δy = g · the delta of another adapter at the site."""

    id: ClassVar[str] = "doubling"
    other: str = setting("fr/lora")

    @staticmethod
    @hookimpl
    def inject(method: Any, sites: Any, adapter: Adapter) -> int:
        other = adapter.attached(method.other)
        for site in sites:
            adapter.place(site, Scaled(adapter.init(site), other.at(site)[0]))
        return len(sites)


def test_a_part_whose_place_another_takes_is_refused() -> None:
    """A head learnt above the head that LoRA changes: LoRA's change would never show."""
    model = build("bert")
    match = r"'default/lora' would learn for nothing at classifier\n.*'default/trained', above it"
    with refused(AttachError, match, model=model):
        inlay.attach(model, LoRA(rank=2, targets=["head"]) + Trained(targets=["head"]))
    inlay.attach(model, LoRA(rank=2, targets=["head"]), train=("head",))  # innermost, whatever else is there
    inlay.attach(model, LoRA(rank=2, targets=["head"]), name="second")  # above it, both act


def test_an_adapter_another_one_computes_with_stays() -> None:
    model = build("llama")
    with refused(AttachError, "other adapters cannot be reached here", model=model):
        inlay.plan(model, Doubling())
    with refused(StateError, "no adapter is called 'fr/lora' here", model=model):
        inlay.attach(model, Doubling(), "both")
    inlay.attach(model, LoRA(), "fr")
    inlay.attach(model, Doubling(), "both")
    match = (
        r"'both/doubling' computes with an adapter that would go[\s\S]*'fr/lora'[\s\S]*detach 'both' first"
    )
    with refused(AttachError, match, model=model):
        inlay.detach(model, "fr")
    inlay.detach(model)


# -- data, combination, weights ------------------------------------------------------------------


def test_a_method_that_calibrates_needs_data() -> None:
    @dataclass(frozen=True)
    class Measures(LoRA):
        id: ClassVar[str] = "measures"
        calibrates: ClassVar[bool] = True

        @staticmethod
        @hookimpl
        def calibrate(method: Any, model: Any, sites: Any, batches: Any) -> dict[str, Tensor]:
            return {"count": torch.tensor(len(list(batches)))}

    model = build("llama")
    with refused(
        ConfigError, r"'measures' must see data before it is placed[\s\S]*data=batches", model=model
    ):
        inlay.attach(model, Measures())
    inlay.attach(model, Measures(), data=[batch_for(model)])
    assert need_state(model).placed[0].adapter.calibration["count"] == 1


@pytest.mark.parametrize(
    ("weights", "how"),
    [({}, "linear"), ({"fr": 1.0}, "tise"), ({"fr": 1.0}, None), (["fr"], "linear"), ("fr", "linear")],
)
def test_what_is_no_combination_is_refused(weights: Any, how: Any) -> None:
    model = build("llama")
    inlay.attach(model, LoRA(), "fr")
    with refused(ConfigError, r"this is no way to combine[\s\S]*'linear', 'magnitude'", model=model):
        inlay.combine(model, weights, name="mix", how=how)


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", None, True])
def test_what_is_no_weight_is_refused(weight: Any) -> None:
    model = build("llama")
    inlay.attach(model, LoRA(), "fr")
    with refused(ConfigError, r"this is no weight of an adapter[\s\S]*'fr'", model=model):
        inlay.combine(model, {"fr": weight}, name="mix")


@pytest.mark.parametrize(
    "other", [LoRA(rank=2), LoRA(targets=["key"]), IA3(), LoRA() + IA3(), LoRA(layers=[0])], ids=str
)
def test_adapters_of_other_stacks_are_not_combined(other: Any) -> None:
    model = build("llama")
    inlay.attach(model, LoRA(), "fr")
    inlay.attach(model, other, "de")
    match = r"only adapters of one stack can be combined tensor by tensor[\s\S]*'fr' and 'de' differ"
    with refused(ConfigError, match, model=model):
        inlay.combine(model, {"fr": 0.5, "de": 0.5}, name="mix", how="tensors")


def test_reading_a_tensor_that_is_not_there_is_refused() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(AttributeError, match="0 has no tensor 'scale'"):
        read(ModuleSite(name="0", module=layer, layer_kind="parameter", weight_name="scale"))


def test_errors_survive_a_process_boundary() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(AttachError("what", saw="this", do="that")))
    assert (type(error), error.what, error.saw, error.do) == (AttachError, "what", "this", "that")
    assert str(error) == "what\n  saw: this\n  do:  that"
    assert isinstance(error, InlayError)
