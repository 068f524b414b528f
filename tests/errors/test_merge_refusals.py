"""Merging what cannot merge: refused before, or undone after, anything was written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import inlay
from inlay.authoring import CannotMerge, Init, InputDelta, Method, OutputDelta, Site, setting
from inlay.errors import ConfigError, MergedError, StateError
from inlay.stack import need_state
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay_adapter import SerialAdapter
from inlay_lora import LoRA
from inlay_prefix import PrefixTuning
from inlay_scaling import IA3, SSF
from inlay_selective import BitFit, LNTuning


class Curved(OutputDelta):
    """Δy = tanh(x A): on a linear layer, without a weight form."""

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.map = init.normal(site.in_features, site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        return torch.tanh(x @ self.map)


class CurvedInput(InputDelta):
    """Δx = tanh(x): on the input of a linear layer, without a weight form."""

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.scale = init.ones(site.in_features)

    def forward(self, x: Tensor, at: Any) -> Tensor:
        return torch.tanh(x) * self.scale


@dataclass(frozen=True)
class Bend(Method):
    id: ClassVar[str] = "bend"
    input: bool = setting(False)

    def delta(self, site: Site, init: Init) -> Any:
        return CurvedInput(site, init) if self.input else Curved(site, init)


class Folded(OutputDelta):
    """Δy = x Vᵀ, folded with whatever mistake the test asks for."""

    def __init__(self, site: Site, init: Init, mistake: str) -> None:
        super().__init__()
        self.change, self.mistake = init.normal(site.out_features, site.in_features), mistake

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        if self.mistake == "forward not finite":
            return (x @ self.change.T) * math.inf
        return x @ self.change.T

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self.change.to(weight.dtype)
        if self.mistake == "sign":
            change = -change
        elif self.mistake == "one percent":
            change = 1.01 * change
        elif self.mistake == "nothing":
            change = 0 * change
        elif self.mistake == "division":
            change = change / 0
        return weight + change, bias


@dataclass(frozen=True)
class Mistaken(Method):
    id: ClassVar[str] = "mistaken"
    mistake: str = setting("none")

    def delta(self, site: Site, init: Init) -> Folded:
        return Folded(site, init, self.mistake)


def stirred(model: nn.Module) -> nn.Module:
    """Move every adapter tensor off its start, so that a merge has something to write."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, _, p in need_state(model).own_parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=0.1)
    return model


def adapted(family: str, stack: Any, **changes: Any) -> nn.Module:
    model = build(family, **changes)
    inlay.attach(model, stack, "fr", seed=0)
    return stirred(model)


NO_WEIGHT_FORM: dict[str, tuple[str, Any, str]] = {
    "a prefix": ("llama", PrefixTuning(length=2, hidden=4), "'prefix_tuning' cannot be merged"),
    "a bottleneck": ("bert", SerialAdapter(), "'serial_adapter' cannot be merged"),
    "a curve on a linear layer": (
        "llama",
        Bend(),
        r"'bend' cannot be merged[\s\S]*Curved is not a linear change of its site's weights",
    ),
    "one of two": (
        "llama",
        LoRA() + PrefixTuning(length=2, hidden=4),
        r"'prefix_tuning' cannot be merged[\s\S]*name the other parts",
    ),
    "a shift of a norm without bias": (
        "llama",
        SSF(targets=["norm"]),
        r"a bias has no place here[\s\S]*LlamaRMSNorm without a bias",
    ),
    "a tied head": (
        "gpt2",
        LoRA(rank=2, targets=["head"]),
        r"the weight cannot be written[\s\S]*tied to transformer\.wte\.weight",
    ),
    "a tied embedding": (
        "qwen",
        LoRA(targets=["embedding"]),
        r"the weight cannot be written[\s\S]*tied to lm_head\.weight",
    ),
    "a wrong sign": (
        "llama",
        Mistaken("sign"),
        r"the folded layer does not do what the adapted one does[\s\S]*error 2\.0e\+00",
    ),
    "one percent too much": (
        "llama",
        Mistaken("one percent"),
        r"does not do what the adapted one does[\s\S]*error 1\.0e-02",
    ),
    "a fold that does nothing": (
        "llama",
        Mistaken("nothing"),
        r"does not do what the adapted one does[\s\S]*error 1\.0e\+00",
    ),
    "a fold that divides by zero": (
        "llama",
        Mistaken("division"),
        "folding gives values that are not finite",
    ),
    "a forward that is not finite": (
        "llama",
        Mistaken("forward not finite"),
        "does not do what the adapted one does",
    ),
}


@pytest.mark.parametrize(("family", "stack", "match"), NO_WEIGHT_FORM.values(), ids=NO_WEIGHT_FORM)
@pytest.mark.parametrize("undo", [True, False])
def test_what_cannot_merge_is_refused(family: str, stack: Any, match: str, undo: bool) -> None:
    model = adapted(family, stack)
    with refused(CannotMerge, match, model=model):
        inlay.merge(model, undo=undo)
    with refused(StateError, "nothing is merged", model=model):
        inlay.unmerge(model)


def test_a_right_fold_is_taken() -> None:
    """The control of the mistakes above."""
    assert inlay.merge(adapted("llama", Mistaken("none"))).worst < 1e-5


def test_what_was_written_before_the_refusal_is_put_back() -> None:
    """The last of several sites refuses: the sites before it were folded already."""
    model = adapted("llama", LoRA(targets=["query", "value", "down"]))
    last = need_state(model).placed[0].adapter.placed[-1]
    with torch.no_grad():
        last[1].up[0, 0] = math.inf  # type: ignore[union-attr, index, operator]
    with refused(CannotMerge, rf"not finite[\s\S]*{last[0].name}", model=model):
        inlay.merge(model)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("stack", [LoRA(), IA3(), BitFit(), LNTuning()], ids=lambda m: m.id)
def test_values_that_are_not_finite_are_not_written(value: float, stack: Method) -> None:
    model = adapted("bert", stack)
    with torch.no_grad():
        next(p for _, _, p in need_state(model).own_parameters()).view(-1)[0] = value
    with refused(CannotMerge, "folding gives values that are not finite", model=model):
        inlay.merge(model)


@pytest.mark.parametrize("tolerance", [0, -1.0, math.nan, math.inf, 1, 2.0, "1e-3", None])
def test_what_is_no_tolerance_is_refused(tolerance: Any) -> None:
    model = adapted("llama", LoRA())
    with refused(ConfigError, "this cannot be a tolerance", model=model):
        inlay.merge(model, tolerance=tolerance)


def test_a_tolerance_is_kept_to() -> None:
    model = adapted("llama", Mistaken("one percent"))
    with refused(CannotMerge, r"error 1\.0e-02 of the effect, tolerance 9\.0e-03", model=model):
        inlay.merge(model, tolerance=9e-3)
    assert 0.009 < inlay.merge(model, tolerance=0.02).worst < 0.011


@pytest.mark.parametrize("parts", [[], "de", ["fr", "de"]])
def test_what_is_not_active_is_refused(parts: Any) -> None:
    model = adapted("llama", LoRA())
    inlay.attach(model, LoRA(), "de", activate=False)
    with refused(CannotMerge, "only active adapters can be merged", model=model):
        inlay.merge(model, parts)


def test_a_stack_under_which_something_stays_is_refused() -> None:
    model = adapted("llama", IA3(targets=["value"]) + LoRA(targets=["value"]))
    match = r"'fr/lora' cannot be merged over 'fr/ia3', which stays[\s\S]*do not commute"
    with refused(CannotMerge, match, model=model):
        inlay.merge(model, ["fr/lora"])
    inlay.merge(model, ["fr/ia3"])


def parametrized(model: nn.Module) -> None:
    parametrizations.weight_norm(model.get_submodule("model.layers.1.self_attn.v_proj"))


def test_a_parametrized_weight_is_refused() -> None:
    model = build("llama")
    parametrized(model)
    inlay.attach(model, LoRA(), "fr")
    stirred(model)
    match = r"the weight cannot be written[\s\S]*v_proj: its weight is computed by a parametrization"
    with refused(CannotMerge, match, model=model):
        inlay.merge(model)


def four_bits(model: nn.Module) -> None:
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    quantised = bnb.nn.Linear4bit(32, 32, bias=False, quant_type="nf4")
    quantised.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    model.get_submodule("model.layers.0.self_attn").q_proj = quantised.to("cpu")  # type: ignore[assignment]


def eight_bits(model: nn.Module) -> None:
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    quantised = bnb.nn.Linear8bitLt(32, 32, bias=False, has_fp16_weights=False)
    quantised.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    model.get_submodule("model.layers.0.self_attn").q_proj = quantised.to("cpu")  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:.*torch.library.*|.*MatMul8bitLt.*|.*_convert_weight_packed.*")
@pytest.mark.parametrize("quantise", [four_bits, eight_bits])
@pytest.mark.parametrize("forward", [False, True], ids=["before a forward", "after a forward"])
def test_a_quantised_weight_is_refused(quantise: Callable[[nn.Module], None], forward: bool) -> None:
    model = build("llama")
    quantise(model)
    inlay.attach(model, LoRA(), "fr")
    stirred(model)
    if forward:
        with torch.no_grad():
            model(**batch_for(model))
    with refused(CannotMerge, r"the weight cannot be written[\s\S]*q_proj: it is quantised", model=model):
        inlay.merge(model)


def test_a_sharded_weight_is_refused() -> None:
    """A real DTensor on a mesh of one process."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 4))
        inlay.attach(model, LoRA(rank=2, targets=["0"]), "fr")
        mesh = init_device_mesh("cpu", (1,))
        model[0].weight = nn.Parameter(
            distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]), requires_grad=False
        )
        with refused(CannotMerge, r"the weight cannot be written[\s\S]*its weight is sharded"):
            inlay.merge(model)
    finally:
        destroy_process_group()


# -- what is undefined while merged --------------------------------------------------------------


def test_everything_undefined_while_merged_is_refused(tmp_path: Any) -> None:
    model = adapted("llama", LoRA())
    inlay.save(model, tmp_path)
    inlay.attach(model, IA3(), "de", activate=False)
    inlay.merge(model)
    for verb, use in {
        "attach": lambda: inlay.attach(model, LoRA(), "new"),
        "load": lambda: inlay.load(model, tmp_path, "new"),
        "combine": lambda: inlay.combine(model, {"fr": 1.0}, name="new"),
        "merge": lambda: inlay.merge(model),
        "set_trainable": lambda: inlay.set_trainable(model, "fr"),
        "check_training": lambda: inlay.check_training(model),
        "advance": lambda: inlay.advance(model, "fr"),
    }.items():
        with refused(
            MergedError,
            rf"{verb} is undefined while adapters are merged[\s\S]*'fr/lora'",
            model=model,
            folder=tmp_path,
        ):
            use()
    for choose in (
        lambda: inlay.use(model),
        lambda: inlay.use(model, "de"),
        lambda: inlay.route(model, ["fr", None]),
    ):
        with refused(
            MergedError, "this choice leaves out adapters that are merged into the base", model=model
        ):
            choose()
